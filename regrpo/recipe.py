"""The small agents that are compared: one base model, one set of tasks, equal budgets.

Demonstrations are mostly of short repairs: half take one hop, half of the others two, and so on, so
that counting hops never tells where a chain ends. Reinforcement learning and evaluation ask one to
seven alike, which is what it has to improve. Three in four reflections are long-winded, as freely
written ones are, so that a cost on reflection has something to save. All depends on the
configuration and its seed, nothing on the machine or on what runs beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from regrpo.config import (
    DataConfig,
    DemoConfig,
    EvalConfig,
    OptimConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from regrpo.data_engine.build import write_corpora
from regrpo.jobs import Job, in_environment
from regrpo.pretrain import run_pretrain
from regrpo.rl import run_rl
from regrpo.sft import run_sft
from regrpo.tasks import SERIAL_FAMILIES

WARM_HOPS, TAIL, FULL_HOPS = (1, 1), 0.5, (1, 7)
# Serial repairs by themselves, and inside longer tasks.
RL_FAMILIES = (*SERIAL_FAMILIES * 2, "layout", "label", "label", "lookup", "sum", "sum")
# Reflections have 10 to 40 tokens of the small tokenizer: the longest cost half a success. First
# come longer repairs, then brevity.
COST = RewardConfig(tokens_per_cost=8.0, eta_warmup_steps=90)
OFFICIAL_CANDIDATES = (
    "one_shot",
    "plain_retry",
    "recovery",
    "failed_recovery",
    "bare_recovery",
)


@dataclass(frozen=True)
class Agent:
    """One row of the comparison.

    Attributes:
        reflect: reflects on a failure; otherwise retries.
        corpora: of supervised training.
        sft_share: of ``sft_steps``.
        start: the agent that reinforcement learning starts from; None is supervised only.
        train: fields of ``TrainConfig`` that differ from the recipe.
    """

    title: str
    reflect: bool
    corpora: tuple[str, ...] = ()
    sft_share: int = 1
    start: str | None = None
    train: Mapping[str, Any] = field(default_factory=dict)


AGENTS = {
    "rot-sft": Agent("RoT-SFT", True, ("clean", "rot")),
    "retry-sft": Agent("Retry-SFT", False, ("clean", "rot")),
    "sft-success": Agent("SFT-success", False, ("success",)),
    "regrpo": Agent("ReGRPO", True, start="rot-sft"),
    "grpo": Agent("GRPO from Retry-SFT", False, start="retry-sft"),
    "grpo-success": Agent("GRPO from SFT-success", False, start="sft-success"),
    "regrpo-no-cost": Agent(
        "ReGRPO, no reflection cost", True, start="rot-sft", train={"reward": replace(COST, eta=0)}
    ),
    "regrpo-no-group": Agent(
        "ReGRPO, no group advantages",
        True,
        start="rot-sft",
        train={"reward": replace(COST, baseline="none")},
    ),
    "regrpo-offline": Agent(
        "Official objective, offline",
        True,
        start="rot-sft",
        train={
            "mode": "offline",
            "policy": "reinforce",
            "kl_estimator": "k1-constant",
            "beta": 0.04,
            "loss_agg_mode": "seq-mean-token-sum",
            "candidates": OFFICIAL_CANDIDATES,
            "group_size": len(OFFICIAL_CANDIDATES),
            "optim": OptimConfig(lr=5e-5),  # at that of the others it forgets to act
            "states": 64,  # as many trajectories an update as the others
        },
    ),
    "rot-sft-long": Agent("RoT-SFT, twice as long", True, ("clean", "rot"), sft_share=2),
}


def _folder(config: DemoConfig, name: str) -> str:
    return str(Path(config.out) / name)


def _model(config: DemoConfig, name: str) -> str:
    return str(Path(config.out) / name / "model")


def _sft(config: DemoConfig, name: str) -> Job:
    agent = AGENTS[name]
    sources = [
        SourceConfig(
            str(Path(config.out) / "data" / f"{corpus}.jsonl"),
            mask="repair" if corpus == "rot" else "clean",
            reflections="keep" if agent.reflect else "strip",
        )
        for corpus in agent.corpora
    ]
    steps = agent.sft_share * config.sft_steps
    sft = SFTConfig(
        model=_model(config, "base"),
        out=_folder(config, name),
        data=sources,
        steps=steps,
        batch_tokens=3072,
        optim=OptimConfig(lr=2e-3, warmup_steps=20),
        seed=config.seed,
    )
    return Job(run_sft, sft, after=("base", "data"), steps=steps)


def _rl(config: DemoConfig, name: str, start: str) -> Job:
    agent = AGENTS[name]
    tasks = TaskConfig(
        seed=10 * config.seed + 2, hops=FULL_HOPS, trap_share=0.95, families=RL_FAMILIES
    )
    settings: dict[str, Any] = {
        "tasks": tasks,
        "reflect": agent.reflect,
        "states": 40,
        "group_size": 8,
        "forced_share": 0.4,
        "max_new_tokens": 80,
        "beta": 0.005,
        "optim": OptimConfig(lr=6e-4),
        "steps": config.rl_steps,
        "seed": config.seed,
        "reward": COST,
        **agent.train,
    }
    rl = TrainConfig(model=_model(config, start), out=_folder(config, name), **settings)
    return Job(partial(in_environment, run_rl), rl, after=(start,), steps=config.rl_steps)


def training_jobs(config: DemoConfig, names: Iterable[str]) -> dict[str, Job]:
    """What trains the named agents, by their folders; what others wait for comes first."""
    base = PretrainConfig(
        out=_folder(config, "base"), steps=config.pretrain_steps, seed=config.seed
    )
    data = DataConfig(
        _folder(config, "data"),
        count=config.data_tasks,
        tasks=TaskConfig(seed=10 * config.seed + 1, hops=WARM_HOPS, tail=TAIL),
        near_miss_share=1.0,
        long_share=0.75,
    )
    jobs = {
        "base": Job(partial(in_environment, run_pretrain), base, steps=config.pretrain_steps),
        "data": Job(partial(in_environment, write_corpora), data),
    }
    for name in sorted(names, key=list(AGENTS).index):
        start = AGENTS[name].start
        jobs[name] = _sft(config, name) if start is None else _rl(config, name, start)
    return jobs


def evaluation(config: DemoConfig, name: str, **settings: Any) -> EvalConfig:
    """Of an agent, on tasks of a seed that nothing else uses."""
    return EvalConfig(
        model=_model(config, name),
        count=config.eval_tasks,
        tasks=TaskConfig(seed=10 * config.seed + 3, hops=FULL_HOPS),
        reflect=AGENTS[name].reflect,
        **settings,
    )
