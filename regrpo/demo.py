"""Everything once, on two CPU cores: five agents from the same tasks and budgets, compared.

Run: ``regrpo demo --out runs/demo``. Each stage is a run of its own in a folder of its own; an
interrupted demo goes on where it stopped. The recipe is that of ``regrpo experiment``, one seed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from regrpo.config import DemoConfig
from regrpo.evaluate import Report, evaluate_model
from regrpo.jobs import Job, in_environment, run_jobs
from regrpo.plots import COLUMNS, cell, plot_curves, plot_table
from regrpo.progress import progress_bar
from regrpo.recipe import AGENTS, evaluation, training_jobs
from regrpo.records import write_atomically, write_records
from regrpo.report import print_transcript, transcript
from regrpo.rollout import Trajectory
from regrpo.workspace import build_workspace

Result = tuple[Report, list[Trajectory]]
SHOWN = ("sft-success", "retry-sft", "rot-sft", "grpo", "regrpo")


def stages(config: DemoConfig) -> dict[str, Job]:
    """The stages of the demo, by name."""
    jobs = training_jobs(config, SHOWN)
    for name in SHOWN:
        held_out = evaluation(config, name)
        jobs[f"eval {name}"] = Job(partial(in_environment, evaluate_model), held_out, (name,))
    return jobs


def run_demo(config: DemoConfig) -> None:
    """Runs every stage and prints, plots and saves the comparison."""
    run_stages(config, SHOWN, stages(config))


def run_stages(config: DemoConfig, names: Sequence[str], jobs: Mapping[str, Job]) -> None:
    """The comparison of the named agents, ReGRPO among them, from the stages that make them."""
    console = Console()
    out = Path(config.out)
    began = time.perf_counter()
    with progress_bar() as progress:
        results, seconds = run_jobs(jobs, progress)
    console.print(results["data"])
    evaluated: dict[str, Result] = {AGENTS[n].title: results[f"eval {n}"] for n in names}
    reports = {title: report for title, (report, _) in evaluated.items()}
    console.print(comparison(reports, config.eval_tasks))
    sft = {AGENTS[n].title: out / n for n in names if AGENTS[n].start is None}
    rl = {AGENTS[n].title: out / n for n in names if AGENTS[n].start is not None}
    plot_curves(sft, rl, out / "curves.png")
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
    shown_with = "" if example.images is None else f" --images '{json.dumps(example.images)}'"
    console.print(
        f"  regrpo run --model {out / 'regrpo' / 'model'} --workspace {folder} "
        f'--task "{example.question}"{shown_with}',
        soft_wrap=True,
        markup=False,
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
