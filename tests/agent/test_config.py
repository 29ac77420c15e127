"""Values out of range are errors that name the key, before anything runs."""

import pytest

from regrpo.config import (
    DataConfig,
    EvalConfig,
    LoraSettings,
    OptimConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)


def sft(**kwargs):
    return SFTConfig(**{"model": "m", "out": "o", "data": [SourceConfig("d.jsonl")], **kwargs})


def train(**kwargs):
    return TrainConfig(model="m", out="o", **kwargs)


CASES = [
    (TaskConfig, {"hops": (0, 1)}, "hops: got (0, 1); expected 1 <= least"),
    (TaskConfig, {"trap_share": -0.1}, "trap_share: got -0.1"),
    (TaskConfig, {"families": ("links", "x")}, "families: got ['x']"),
    (DataConfig, {"out": "o", "count": 0}, "count: got 0; expected 1 or more"),
    (DataConfig, {"out": "o", "near_miss_share": 2.0}, "near_miss_share: got 2.0"),
    (OptimConfig, {"lr": 0.0}, "optim.lr: got 0.0"),
    (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps: got -1"),
    (OptimConfig, {"grad_clip": 0.0}, "optim.grad_clip: got 0.0"),
    (PretrainConfig, {"out": "o", "steps": 0}, "steps: got 0"),
    (PretrainConfig, {"out": "o", "hidden_size": 30, "num_heads": 4}, "hidden_size: got 30"),
    (LoraSettings, {"rank": -1}, "lora.rank: got -1"),
    (SourceConfig, {"path": "d", "mask": "all"}, "mask: got 'all'; expected clean, rot or repair"),
    (SourceConfig, {"path": "d", "reflections": "drop"}, "reflections: got 'drop'"),
    (sft, {"data": []}, "data: got []; expected at least one data file"),
    (sft, {"steps": 0}, "steps: got 0"),
    (sft, {"save_every": 0}, "save_every: got 0"),
    (sft, {"max_length": 9000}, "max_length: got 9000; expected at most batch_tokens=4096"),
    (RewardConfig, {"scale": "batch"}, "scale: got 'batch'; expected none or group"),
    (RewardConfig, {"tokens_per_cost": 0.0}, "tokens_per_cost: got 0.0"),
    (RewardConfig, {"clip": 0.0}, "clip: got 0.0"),
    (RewardConfig, {"min_std": -1.0}, "min_std: got -1.0"),
    (train, {"steps": 0}, "steps: got 0"),
    (train, {"states": 0}, "states: got 0"),
    (train, {"group_size": 1}, "group_size: got 1; expected 2 or more"),
    (train, {"forced_share": 1.5}, "forced_share: got 1.5"),
    (train, {"epochs": 0}, "epochs: got 0"),
    (train, {"temperature": 0.0}, "temperature: got 0.0"),
    (train, {"max_new_tokens": 0}, "max_new_tokens: got 0"),
    (train, {"beta": -0.1}, "beta: got -0.1"),
    (train, {"save_every": 0}, "save_every: got 0"),
    (train, {"log_to": ("tensorboard",)}, "log_to: got ['tensorboard']; expected some of wandb"),
    (sft, {"keep_checkpoints": 0}, "keep_checkpoints: got 0; expected 1 or more"),
    (train, {"log_trajectories_every": -1}, "log_trajectories_every: got -1"),
    (train, {"log_groups": 0}, "log_groups: got 0"),
    (EvalConfig, {"model": "m", "count": 0}, "count: got 0"),
    (EvalConfig, {"model": "m", "temperature": -1.0}, "temperature: got -1.0"),
]


@pytest.mark.parametrize(("make", "fields", "message"), CASES)
def test_a_value_out_of_range_is_named(make, fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make(**fields)
    assert str(error.value).startswith(message)


def test_the_defaults_are_valid():
    for make in (TaskConfig, OptimConfig, RewardConfig, LoraSettings, sft, train):
        make()
    PretrainConfig(out="o")
    DataConfig(out="o")
    EvalConfig(model="m")
