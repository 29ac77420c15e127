"""Values out of range are errors that name the key, before anything runs."""

import pytest

from regrpo.config import (
    DataConfig,
    EvalConfig,
    LoraSettings,
    OptimConfig,
    OptionsConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TeacherConfig,
    TrainConfig,
)


def sft(**kwargs):
    return SFTConfig(**{"model": "m", "out": "o", "data": [SourceConfig("d.jsonl")], **kwargs})


def train(**kwargs):
    return TrainConfig(model="m", out="o", **kwargs)


def offline(**kwargs):
    return train(mode="offline", policy="reinforce", **kwargs)


CASES = [
    (TaskConfig, {"hops": (0, 1)}, "hops: got (0, 1); expected 1 <= least"),
    (TaskConfig, {"trap_share": -0.1}, "trap_share: got -0.1"),
    (TaskConfig, {"families": ("links", "x")}, "families: got ['x']"),
    (DataConfig, {"out": "o", "count": 0}, "count: got 0; expected 1 or more"),
    (DataConfig, {"out": "o", "near_miss_share": 2.0}, "near_miss_share: got 2.0"),
    (DataConfig, {"out": "o", "non_commit_share": 1.0}, "non_commit_share: got 1.0"),
    (TeacherConfig, {"base_url": "x", "model": "m"}, "teacher.base_url: got 'x'; expected http"),
    (TeacherConfig, {"base_url": "http://a:b@x", "model": "m"}, "teacher.base_url: expected no"),
    (TeacherConfig, {"base_url": "http://x"}, "teacher.model: got None; expected a name"),
    (TeacherConfig, {"model": "m"}, "teacher.model: got 'm'"),
    (TeacherConfig, {"api_key_env": "gsk_1"}, "teacher.api_key_env: expected the name"),
    (TeacherConfig, {"asks": 0}, "teacher.asks: got 0"),
    (TeacherConfig, {"timeout_s": 0.0}, "teacher.timeout_s: got 0.0"),
    (TeacherConfig, {"retries": -1}, "teacher.retries: got -1"),
    (TeacherConfig, {"max_tokens": 0}, "teacher.max_tokens: got 0"),
    (OptimConfig, {"lr": 0.0}, "optim.lr: got 0.0"),
    (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps: got -1"),
    (OptimConfig, {"grad_clip": 0.0}, "optim.grad_clip: got 0.0"),
    (OptimConfig, {"schedule": "step"}, "optim.schedule: got 'step'; expected one of linear, cos"),
    (OptimConfig, {"final_lr_share": 1.5}, "optim.final_lr_share: got 1.5; expected between 0"),
    (PretrainConfig, {"out": "o", "steps": 0}, "steps: got 0"),
    (PretrainConfig, {"out": "o", "hidden_size": 30, "num_heads": 4}, "hidden_size: got 30"),
    (LoraSettings, {"rank": -1}, "lora.rank: got -1"),
    (SourceConfig, {"path": "d", "mask": "all"}, "mask: got 'all'; expected clean, rot or repair"),
    (SourceConfig, {"path": "d", "reflections": "drop"}, "reflections: got 'drop'"),
    (sft, {"data": []}, "data: got []; expected at least one data file"),
    (sft, {"steps": 0}, "steps: got 0"),
    (sft, {"save_every": 0}, "save_every: got 0"),
    (sft, {"max_length": 9000}, "max_length: got 9000; expected at most batch_tokens=4096"),
    (sft, {"micro_batch_tokens": 99}, "micro_batch_tokens: got 99; expected at least max_length="),
    (sft, {"dtype": "float16"}, "dtype: got 'float16'; expected one of auto, float32, bfloat16"),
    (train, {"dtype": "half"}, "dtype: got 'half'; expected one of auto, float32, bfloat16"),
    (train, {"parallel": "tp"}, "parallel: got 'tp'; expected one of ddp, fsdp"),
    (RewardConfig, {"scale": "std"}, "scale: got 'std'; expected none, group or batch"),
    (RewardConfig, {"tokens_per_cost": 0.0}, "tokens_per_cost: got 0.0"),
    (RewardConfig, {"clip": 0.0}, "clip: got 0.0"),
    (RewardConfig, {"min_std": -1.0}, "min_std: got -1.0"),
    (RewardConfig, {"baseline": "median"}, "baseline: got 'median'; expected mean, leave_one_out"),
    (RewardConfig, {"lambda_val": -0.3}, "lambda_val: got -0.3; expected 0 or more"),
    (RewardConfig, {"alpha": 0.0}, "alpha: got 0.0; expected positive, or null"),
    (RewardConfig, {"alpha": 0.5, "lambda_val": 0.3}, "lambda_val: got 0.3; expected 0 with alpha"),
    (RewardConfig, {"eta_warmup_steps": -1}, "eta_warmup_steps: got -1; expected 0 or more"),
    (OptionsConfig, {"ratio_level": "turn"}, "options.ratio_level: got 'turn'; expected token,"),
    (OptionsConfig, {"clip_target": 1.0}, "options.clip_target: got 1.0"),
    (
        OptionsConfig,
        {"clip_target": 0.5, "ratio_level": "segment"},
        "options.clip_target: got 0.5; expected null with ratio_level=segment",
    ),
    (OptionsConfig, {"clip_high_max": 1.0}, "options.clip_high_max: got 1.0"),
    (OptionsConfig, {"clip_low_max": 1.0}, "options.clip_low_max: got 1.0"),
    (OptionsConfig, {"clip_step": 0.0}, "options.clip_step: got 0.0"),
    (OptionsConfig, {"step_weight": -1.0}, "options.step_weight: got -1.0"),
    (OptionsConfig, {"step_gamma": 0.0}, "options.step_gamma: got 0.0"),
    (OptionsConfig, {"demonstration_weight": -1.0}, "options.demonstration_weight: got -1.0"),
    (OptionsConfig, {"penalty": -0.1}, "options.penalty: got -0.1"),
    (OptionsConfig, {"penalty_thresholds": (80, 40)}, "options.penalty_thresholds: got (80, 40)"),
    (OptionsConfig, {"keep": 1}, "options.keep: got 1; expected 2 or more"),
    (OptionsConfig, {"replay": -1, "repeat_after": 1}, "options.replay: got -1"),
    (
        OptionsConfig,
        {"replay": 8},
        "options.replay: got 8; expected 0 without options.repeat_after",
    ),
    (OptionsConfig, {"repeat_after": 0}, "options.repeat_after: got 0"),
    (OptionsConfig, {"refinements": -1}, "options.refinements: got -1"),
    (OptionsConfig, {"refinement_gamma": 0.0}, "options.refinement_gamma: got 0.0"),
    (
        train,
        {"options": OptionsConfig(keep=6)},
        "options.keep: got 6; expected at most group_size=5",
    ),
    (
        train,
        {"options": OptionsConfig(ratio_level="segment"), "loss_agg_mode": "seq-mean-token-mean"},
        "loss_agg_mode: got 'seq-mean-token-mean'; expected another one with",
    ),
    (train, {"zero_variance": "drop"}, "zero_variance: got 'drop'; expected keep, skip or"),
    (train, {"resample_rounds": 0}, "resample_rounds: got 0"),
    (train, {"steps": 0}, "steps: got 0"),
    (train, {"states": 0}, "states: got 0"),
    (train, {"group_size": 1}, "group_size: got 1; expected 2 or more"),
    (train, {"forced_share": 1.5}, "forced_share: got 1.5"),
    (train, {"epochs": 0}, "epochs: got 0"),
    (train, {"temperature": 0.0}, "temperature: got 0.0"),
    (train, {"max_new_tokens": 0}, "max_new_tokens: got 0"),
    (train, {"beta": -0.1}, "beta: got -0.1"),
    (train, {"save_every": 0}, "save_every: got 0"),
    (train, {"mode": "online"}, "mode: got 'online'; expected local, episodes or offline"),
    (train, {"max_steps": 0}, "max_steps: got 0; expected 1 or more"),
    (
        train,
        {"own_states_share": 0.7},
        "own_states_share: got 0.7; expected 0 or more, and with forced_share=0.4 at most 1",
    ),
    (
        train,
        {"own_states_share": 0.1, "mode": "episodes"},
        "own_states_share: got 0.1; expected 0 but in mode local",
    ),
    (train, {"policy": "nll"}, "policy: got 'nll'; expected clip, cispo, sapo or reinforce"),
    (train, {"kl_estimator": "k4"}, "kl_estimator: got 'k4'; expected k1, k2, k3 or k1-constant"),
    (
        train,
        {"kl_estimator": "k1-constant"},
        "policy: got 'clip'; expected reinforce with kl_estimator k1-constant",
    ),
    (train, {"mode": "offline"}, "policy: got 'clip'; expected reinforce with mode offline"),
    (offline, {"reflect": False}, "reflect: got False; expected true with mode offline"),
    (
        offline,
        {"group_size": 4},
        "group_size: got 4; expected the number of candidates, 5, with mode offline",
    ),
    (
        offline,
        {"candidates": ("one_shot", "none")},
        "candidates: got ('one_shot', 'none'); expected different ones of one_shot, ",
    ),
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
    for make in (TaskConfig, OptimConfig, OptionsConfig, RewardConfig, LoraSettings, sft, train):
        make()
    train(forced_share=0.9, own_states_share=0.1)
    offline()
    PretrainConfig(out="o")
    DataConfig(out="o")
    EvalConfig(model="m")
