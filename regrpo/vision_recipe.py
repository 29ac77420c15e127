"""The small vision-language agents that are compared: what `regrpo.recipe` is, on page images."""

from functools import partial
from pathlib import Path

from regrpo.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    RewardConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
    VisionDemoConfig,
    VisionPretrainConfig,
)
from regrpo.data_engine.build import write_corpora
from regrpo.evaluate import evaluate_model
from regrpo.jobs import Job, in_environment
from regrpo.recipe import AGENTS
from regrpo.rl import run_rl
from regrpo.sft import run_sft
from regrpo.tasks import VISION_FAMILIES
from regrpo.vision_pretrain import run_vision_pretrain

SHOWN = ("retry-sft", "rot-sft", "regrpo")


def _tasks(config: VisionDemoConfig, use: int, trap_share: float = 0.65) -> TaskConfig:
    """Of a seed that nothing else uses."""
    return TaskConfig(seed=10 * config.seed + use, trap_share=trap_share, families=VISION_FAMILIES)


def stages(config: VisionDemoConfig) -> dict[str, Job]:
    """The stages of the demo, by name."""
    out = Path(config.out)
    base = VisionPretrainConfig(
        out=str(out / "base"), steps=config.pretrain_steps, seed=config.seed
    )
    data = DataConfig(
        str(out / "data"), count=config.data_tasks, tasks=_tasks(config, 1), near_miss_share=1.0
    )
    jobs = {
        "base": Job(partial(in_environment, run_vision_pretrain), base, steps=base.steps),
        "data": Job(partial(in_environment, write_corpora), data),
    }
    for name in SHOWN:
        agent = AGENTS[name]
        if agent.start is None:
            sft = _sft(config, name)
            jobs[name] = Job(run_sft, sft, after=("base", "data"), steps=sft.steps)
        else:
            rl = _rl(config, name, agent.start)
            jobs[name] = Job(
                partial(in_environment, run_rl), rl, after=(agent.start,), steps=rl.steps
            )
        held_out = EvalConfig(
            model=str(out / name / "model"),
            count=config.eval_tasks,
            tasks=_tasks(config, 3),
            reflect=agent.reflect,
        )
        jobs[f"eval {name}"] = Job(partial(in_environment, evaluate_model), held_out, (name,))
    return jobs


def _sft(config: VisionDemoConfig, name: str) -> SFTConfig:
    out, agent = Path(config.out), AGENTS[name]
    sources = [
        SourceConfig(
            str(out / "data" / f"{corpus}.jsonl"),
            mask="repair" if corpus == "rot" else "clean",
            reflections="keep" if agent.reflect else "strip",
        )
        for corpus in agent.corpora
    ]
    return SFTConfig(
        model=str(out / "base" / "model"),
        out=str(out / name),
        data=sources,
        steps=config.sft_steps,
        batch_tokens=3072,
        optim=OptimConfig(lr=1e-3, warmup_steps=20),
        seed=config.seed,
    )


def _rl(config: VisionDemoConfig, name: str, start: str) -> TrainConfig:
    out = Path(config.out)
    return TrainConfig(
        model=str(out / start / "model"),
        out=str(out / name),
        tasks=_tasks(config, 2, trap_share=0.95),
        reflect=AGENTS[name].reflect,
        states=24,
        group_size=8,
        forced_share=0.4,
        max_new_tokens=80,
        beta=0.005,
        optim=OptimConfig(lr=4e-4),
        steps=config.rl_steps,
        seed=config.seed,
        reward=RewardConfig(tokens_per_cost=40.0),
    )
