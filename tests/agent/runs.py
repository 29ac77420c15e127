"""Configurations of tiny runs, and what they leave."""

import json

import torch

from regrpo.config import OptimConfig, SFTConfig, SourceConfig, TaskConfig, TrainConfig

STEPS, SAVE_EVERY = 6, 2


def sft_config(base, out, **kwargs):
    defaults = {
        "model": str(base / "model"),
        "out": str(out),
        "data": [SourceConfig(str(base / "rot.jsonl"))],
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "batch_tokens": 1500,
        "optim": OptimConfig(lr=3e-3, warmup_steps=2),
    }
    return SFTConfig(**{**defaults, **kwargs})


def rl_config(base, out, **kwargs):
    defaults = {
        "model": str(base / "model"),
        "out": str(out),
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "states": 2,
        "group_size": 4,
        "max_new_tokens": 24,
        "epochs": 2,
        "batch_tokens": 2000,
        "tasks": TaskConfig(seed=5),
        "log_trajectories_every": 1,
    }
    return TrainConfig(**{**defaults, **kwargs})


def metrics_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def state_of(out):
    """The last checkpoint: weights, optimizer and generators."""
    last = max((out / "checkpoints").iterdir())
    return torch.load(last / "state.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
