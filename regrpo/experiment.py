"""The comparison that the method is judged by: every agent, several seeds, equal budgets.

Run: ``regrpo experiment --out runs/experiment``. Each seed has its own base model, data, training
tasks and held-out tasks; within a seed all agents share them. Every stage is a run that resumes, so
an interrupted experiment goes on where it stopped. Intervals are over seeds: what a reader who
trains once more has to expect.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from regrpo.config import DemoConfig, EvalConfig, ExperimentConfig
from regrpo.data_engine.build import Demonstration
from regrpo.environment import Environment
from regrpo.errors import RunError
from regrpo.evaluate import evaluate, held_out, load_policy, rate
from regrpo.experiment_report import Results, figures, page_section, write_section
from regrpo.jobs import Job, in_environment, run_jobs
from regrpo.progress import progress_bar
from regrpo.recipe import AGENTS, evaluation, training_jobs
from regrpo.records import write_atomically, write_records
from regrpo.report import transcript
from regrpo.rollout import Trajectory
from regrpo.tasks import SERIAL_FAMILIES


def hops_of(demonstration: Demonstration) -> int:
    """How many looks the repair that a serial task needs takes; 0 if it needs none."""
    return sum(f.reflection.evidence.count(" -> ") for f in demonstration.traps)


def success_by_hops(
    demonstrations: Sequence[Demonstration], episodes: Sequence[Trajectory]
) -> dict[str, Any]:
    """Success on the serial families, by the hops of the repair."""
    outcomes: dict[int, list[bool]] = defaultdict(list)
    for demonstration, episode in zip(demonstrations, episodes, strict=True):
        if demonstration.task.family in SERIAL_FAMILIES:
            outcomes[hops_of(demonstration)].append(episode.success)
    return {str(hops): rate(outcomes[hops]).to_dict() for hops in sorted(outcomes)}


def evaluate_agent(config: EvalConfig, environment: Environment) -> dict[str, Any]:
    """Evaluates an agent once and keeps the report in ``config.out``.

    Raises:
        RunError: the folder holds the report of another evaluation.
    """
    assert config.out is not None
    path = Path(config.out) / "report.json"
    # Through JSON, which has no tuples; not where it is, so that a folder may be moved.
    claimed = json.loads(json.dumps(asdict(replace(config, out=None, model=""))))
    if path.exists():
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if report["config"] != claimed:
            raise RunError(f"{path} is of another evaluation; choose another out, or delete it")
        return report
    demonstrations = held_out(config, environment)
    policy = load_policy(config)
    found, episodes = evaluate(
        policy, environment, demonstrations, reflect=config.reflect, seed=config.seed
    )
    hops = success_by_hops(demonstrations, episodes)
    report = {"config": claimed, "hops": hops, **found.to_dict()}
    write_records(path.with_name("transcripts.jsonl"), (transcript(t) for t in episodes))
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    return report


def seed_configs(config: ExperimentConfig) -> dict[int, DemoConfig]:
    """One demo's configuration a seed."""
    shared = {k: v for k, v in asdict(config).items() if k not in ("out", "seed", "seeds", "page")}
    seeds = range(config.seed, config.seed + config.seeds)
    return {s: DemoConfig(out=str(Path(config.out) / f"seed-{s}"), seed=s, **shared) for s in seeds}


def jobs(config: ExperimentConfig) -> dict[str, Job]:
    """All stages, named ``seed/stage``, seed by seed."""
    all_jobs = {}
    for seed, demo in seed_configs(config).items():
        named = training_jobs(demo, AGENTS)
        for name in AGENTS:
            held_out_tasks = evaluation(demo, name, out=str(Path(demo.out) / "eval" / name))
            named[f"eval {name}"] = Job(
                partial(in_environment, evaluate_agent), held_out_tasks, (name,)
            )
        for name, job in named.items():
            after = tuple(f"{seed}/{other}" for other in job.after)
            all_jobs[f"{seed}/{name}"] = replace(job, after=after)
    return all_jobs


def run_experiment(config: ExperimentConfig) -> None:
    """Runs what is not done yet; writes results.json, tables and figures."""
    with progress_bar() as progress:
        done, _ = run_jobs(jobs(config), progress)
    seeds = seed_configs(config)
    reports = {a: [done[f"{s}/eval {a}"] for s in seeds] for a in AGENTS}
    metrics = {a: [Path(demo.out) / a / "metrics.jsonl" for demo in seeds.values()] for a in AGENTS}
    results = Results(reports, metrics)
    out = Path(config.out)
    write_atomically(out / "results.json", json.dumps(reports, indent=2) + "\n")
    page = Path(config.page) if config.page else out / "results.md"
    drawn = figures(results, page.parent / "figures")
    section = page_section(results, [path.relative_to(page.parent) for path in drawn])
    write_section(page, section)
    Console().print(section, markup=False)
