"""Stages of a comparison side by side, one process a core: models this small use one core best."""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from regrpo.environment import Environment, LocalEnvironment
from regrpo.progress import disable_loading_bars


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


def in_environment(stage: Callable[[Any, Environment], Any], config: Any) -> Any:
    with LocalEnvironment() as environment:
        return stage(config, environment)


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
