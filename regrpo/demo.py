"""Everything once, on two CPU cores: five agents from the same tasks and budgets, compared.

Run: ``regrpo demo --out runs/demo``. Each stage is a run of its own in a folder of its own; an
interrupted demo goes on where it stopped. The supervised agents see repairs of up to three
hops, and rarely a longer one; reinforcement learning and evaluation go to six, which is what it has
to improve. Models this small use one core best, so the stages run side by side, one process a core.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from regrpo.config import (
    DataConfig,
    DemoConfig,
    EvalConfig,
    OptimConfig,
    PretrainConfig,
    SFTConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from regrpo.data_engine.build import write_corpora
from regrpo.environment import Environment, LocalEnvironment
from regrpo.evaluate import Report, evaluate_model
from regrpo.plots import COLUMNS, cell, plot_curves, plot_table
from regrpo.pretrain import run_pretrain
from regrpo.progress import disable_loading_bars, progress_bar
from regrpo.records import write_atomically, write_records
from regrpo.report import print_transcript, transcript
from regrpo.rl import run_rl
from regrpo.rollout import Trajectory
from regrpo.sft import run_sft
from regrpo.tasks import SERIAL_FAMILIES
from regrpo.workspace import build_workspace

WARM_HOPS, RL_HOPS, FULL_HOPS = (1, 3), (2, 6), (1, 6)
# Serial repairs by themselves, and inside longer tasks.
RL_FAMILIES = (*SERIAL_FAMILIES * 3, "label", "lookup", "sum")
Result = tuple[Report, list[Trajectory]]


@dataclass(frozen=True)
class Job:
    """A stage: what runs, on which configuration, behind which stages, in how many steps."""

    run: Callable[[Any], Any]
    config: Any
    after: tuple[str, ...] = ()
    steps: int = 1


def _one_thread() -> None:
    torch.set_num_threads(1)
    disable_loading_bars()


def _in_environment(stage: Callable[[Any, Environment], Any], config: Any) -> Any:
    with LocalEnvironment() as environment:
        return stage(config, environment)


def stages(config: DemoConfig) -> dict[str, Job]:
    """The stages of the demo, by name; trained agents carry the name of their folder."""
    out = Path(config.out)
    model = {name: str(out / name / "model") for name in ("base", *AGENTS)}
    data = {name: str(out / "data" / f"{name}.jsonl") for name in ("success", "clean", "rot")}
    first_tries, repairs = SourceConfig(data["clean"]), SourceConfig(data["rot"], mask="repair")
    tasks = TaskConfig(seed=10 * config.seed + 1, hops=WARM_HOPS, tail=0.06)
    jobs = {
        "base": Job(
            partial(_in_environment, run_pretrain),
            PretrainConfig(out=str(out / "base"), steps=config.pretrain_steps, seed=config.seed),
            steps=config.pretrain_steps,
        ),
        "data": Job(
            partial(_in_environment, write_corpora),
            DataConfig(str(out / "data"), count=config.data_tasks, tasks=tasks),
        ),
    }
    corpora = {
        "retry-sft": [first_tries, replace(repairs, reflections="strip")],
        "rot-sft": [first_tries, repairs],
        "sft-success": [SourceConfig(data["success"])],
    }
    for name, sources in corpora.items():
        sft = SFTConfig(
            model=model["base"],
            out=str(out / name),
            data=sources,
            steps=config.sft_steps,
            batch_tokens=3072,
            optim=OptimConfig(lr=2e-3, warmup_steps=20),
            seed=config.seed,
        )
        jobs[name] = Job(run_sft, sft, after=("base", "data"), steps=config.sft_steps)
    for name, start in (("regrpo", "rot-sft"), ("grpo", "retry-sft")):
        rl = TrainConfig(
            model=model[start],
            out=str(out / name),
            tasks=TaskConfig(
                seed=10 * config.seed + 2, hops=RL_HOPS, trap_share=0.85, families=RL_FAMILIES
            ),
            reflect=AGENTS[name].reflect,
            states=48,
            group_size=8,
            forced_share=0.8,
            max_new_tokens=48,
            beta=0.005,
            optim=OptimConfig(lr=6e-4),
            steps=config.rl_steps,
            seed=config.seed,
        )
        jobs[name] = Job(
            partial(_in_environment, run_rl), rl, after=(start,), steps=config.rl_steps
        )
    for name, agent in AGENTS.items():
        held_out = EvalConfig(
            model=model[name],
            count=config.eval_tasks,
            tasks=TaskConfig(seed=10 * config.seed + 3, hops=FULL_HOPS),
            reflect=agent.reflect,
        )
        jobs[f"eval {name}"] = Job(
            partial(_in_environment, evaluate_model), held_out, after=(name,)
        )
    # Long chains first; what nothing waits for comes last.
    order = ["base", "data", "rot-sft", "retry-sft", "regrpo", "grpo", "sft-success"]
    return {name: jobs[name] for name in [*order, *(n for n in jobs if n not in order)]}


@dataclass(frozen=True)
class Agent:
    """One row of the comparison."""

    title: str
    reflect: bool


AGENTS = {
    "sft-success": Agent("SFT-success", reflect=False),
    "retry-sft": Agent("Retry-SFT", reflect=False),
    "rot-sft": Agent("RoT-SFT", reflect=True),
    "grpo": Agent("GRPO", reflect=False),
    "regrpo": Agent("ReGRPO", reflect=True),
}


def run_jobs(
    jobs: Mapping[str, Job], progress: Progress
) -> tuple[dict[str, Any], dict[str, float]]:
    """Runs jobs side by side, each when those it waits for are done; returns results and seconds.

    The first error of a job ends the others and is raised.
    """
    results: dict[str, Any] = {}
    began: dict[str, float] = {}
    seconds: dict[str, float] = {}
    running: dict[Future[Any], str] = {}
    bars: dict[str, TaskID] = {}
    workers = min(2, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        while len(results) < len(jobs):
            for name, job in jobs.items():
                ready = all(other in results for other in job.after)
                if ready and name not in began and len(running) < workers:
                    began[name] = time.perf_counter()
                    bars[name] = progress.add_task(name, total=job.steps)
                    running[pool.submit(job.run, job.config)] = name
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                results[name] = future.result()
                seconds[name] = time.perf_counter() - began[name]
                progress.update(bars[name], completed=jobs[name].steps)
            for name in running.values():
                if jobs[name].steps > 1:
                    progress.update(bars[name], completed=steps_done(jobs[name].config.out))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results, seconds


def steps_done(out: str) -> int:
    """Lines of a run's metrics so far."""
    path = Path(out) / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def run_demo(config: DemoConfig) -> None:
    """Runs every stage and prints, plots and saves the comparison."""
    console = Console()
    out = Path(config.out)
    began = time.perf_counter()
    with progress_bar() as progress:
        results, seconds = run_jobs(stages(config), progress)
    console.print(results["data"])
    evaluated: dict[str, Result] = {
        agent.title: results[f"eval {name}"] for name, agent in AGENTS.items()
    }
    reports = {title: report for title, (report, _) in evaluated.items()}
    console.print(comparison(reports, config.eval_tasks))
    runs = {agent.title: out / name for name, agent in AGENTS.items()}
    rl = {title: runs.pop(title) for title in ("GRPO", "ReGRPO")}
    plot_curves(runs, rl, out / "curves.png")
    plot_table(reports, out / "table.png", f"{config.eval_tasks} held-out tasks, 95 % intervals")
    episodes = evaluated["ReGRPO"][1]
    write_records(out / "transcripts.jsonl", (transcript(t) for t in episodes))
    minutes = (time.perf_counter() - began) / 60
    summary = {
        "reports": {name: report.to_dict() for name, report in reports.items()},
        "seconds": seconds,
        "minutes": minutes,
    }
    write_atomically(out / "results.json", json.dumps(summary, indent=2) + "\n")
    shown = examples(episodes)
    for title, episode in shown.items():
        console.rule(title)
        print_transcript(episode, console)
    example = shown.get("a recovery", episodes[0]).start.task
    folder = out / "workspace"
    if not folder.exists():
        folder.mkdir()
        assert not isinstance(example.workspace, Path)
        build_workspace(folder, example.workspace)
    console.print(f"{minutes:.1f} minutes; table.png, curves.png and results.json are in {out}")
    console.print("Ask the trained agent about the files of a folder:", style="bold")
    console.print(
        f"  regrpo run --model {out / 'regrpo' / 'model'} --workspace {folder} "
        f'--task "{example.question}"',
        soft_wrap=True,
    )


def comparison(reports: Mapping[str, Report], count: int) -> Table:
    """The comparison as a table for the terminal."""
    table = Table(title=f"{count} held-out tasks, 95 % Wilson intervals")
    table.add_column("agent")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, report in reports.items():
        table.add_row(name, *(cell(report, column).replace("[", r"\[") for column in COLUMNS))
    return table


def examples(episodes: Sequence[Trajectory]) -> dict[str, Trajectory]:
    """A one-shot success, a recovery and a failure, the first of each there is."""
    kinds = {
        "a one-shot success": lambda t: t.success and not any(u.correction for u in t.turns),
        "a recovery": lambda t: t.success and any(u.correction for u in t.turns),
        "a failure": lambda t: not t.success,
    }
    found = ((title, next(filter(is_kind, episodes), None)) for title, is_kind in kinds.items())
    return {title: episode for title, episode in found if episode is not None}
