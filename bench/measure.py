"""Times several ways of computing one thing, in turns, and their memory."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import DEVICE, ForeignLoad, memory_budget

Call = Callable[[], Any]
WRONG = 0.05  # relative error; below it a peer is only less exact


@dataclass
class Provider:
    """One way of computing a case.

    Attributes:
        kind: "ours", "eager", "torch.compile", "peer" or "floor" (what no way can beat).
        build: makes the call that is timed; imports and compiles.
        needs: bytes that the call takes beyond its inputs, at least.
        note: what it does differently, for the table.
        traffic, flops: bytes and floating-point operations that the work takes at least.
        checked: whether its result is compared with fp64; a floor has none.
        held: bytes that it keeps between calls; they count as extra.
    """

    name: str
    kind: str
    build: Callable[[], Call]
    needs: int = 0
    note: str = ""
    traffic: int = 0
    flops: int = 0
    checked: bool = True
    held: int = 0


@dataclass
class Case:
    """What `measure` needs to know: `restore` puts the inputs back, `error` is the relative error
    of a call's result against fp64, `tolerance` what ours may have of it, `record` what every
    record of the case says.
    """

    restore: Callable[[], None]
    error: Callable[[Any], float]
    tolerance: float
    record: dict[str, Any]
    once: bool = False


@dataclass
class Run:
    provider: Provider
    status: str = "ok"
    note: str = ""
    call: Call = lambda: None
    seconds: list[float] = field(default_factory=list)
    extra: int = 0
    error: float | None = None
    rounds: int = 1


def settle(case: Case) -> None:
    """Puts the inputs back, and gives freed memory back to the system: otherwise what an earlier
    provider left in the heap decides whether the next one touches fresh pages.
    """
    case.restore()
    if DEVICE.type == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def timed(call: Call) -> float:
    """Seconds of one call. On a GPU between two events of the stream, with no synchronisation
    before: what restored the inputs is still running, so that launches are not waited for.
    """
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
    del result  # freeing it is not timed
    return seconds


def timed_with_memory(call: Call) -> tuple[float, int]:
    """`(seconds, bytes beyond what was there before, at the worst moment)`."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(call)
        return seconds, torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status("VmRSS")
    seconds = timed(call)
    return seconds, max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert match
    return 1024 * int(match.group(1))


def _rounds(seconds: float) -> int:
    """Many of what is quick and noisy, three of what is slow, one of what is hopeless."""
    if seconds > 8:
        return 1
    most = 30 if DEVICE.type == "cuda" else 9
    return min(max(int(1 / max(seconds, 1e-6)), 3), most)


def measure(case: Case, providers: list[Provider], benchmark: Any) -> list[dict[str, Any]]:
    """Records of all providers. The rounds of the first one (ours) are pytest-benchmark's; the
    others take turns with it, a round at a time, so that all see the same machine.

    Nothing that ours raises is caught. Whatever another provider raises goes into its record.
    """
    runs = [_prepared(case, p) for p in providers]
    ours, *others = runs
    foreign = ForeignLoad()
    for run in others:
        _attempt(run, lambda run=run: _first_round(case, run))
    if case.once:
        benchmark.pedantic(lambda: _first_round(case, ours), rounds=1)
    else:
        _first_round(case, ours)
        turn = iter(range(1, ours.rounds))
        benchmark.pedantic(
            lambda: ours.seconds.append(timed(ours.call)),
            setup=lambda: _others_turn(case, ours, others, next(turn, ours.rounds)),
            rounds=max(ours.rounds - 1, 1),
            iterations=1,
        )
    case.restore()
    busy = round(foreign.cores(), 2)
    return [_record(case, run, busy) for run in runs]


def _prepared(case: Case, provider: Provider) -> Run:
    run = Run(provider, note=provider.note)
    budget = memory_budget()
    if provider.needs > budget:
        run.status = "left out"
        run.note = f"needs at least {provider.needs / 1e9:.1f} GB, may use {budget / 1e9:.1f}"
        assert provider.kind != "ours", run.note
        return run
    if provider.kind == "ours":
        _warm_up(case, run)
    else:
        _attempt(run, lambda: _warm_up(case, run))
    return run


def _warm_up(case: Case, run: Run) -> None:
    run.call = run.provider.build()
    if case.once:
        return
    for _ in range(3 if DEVICE.type == "cuda" else 1):
        case.restore()
        result = run.call()
    if not run.provider.checked:
        return
    run.error = case.error(result)
    del result
    if not run.error <= case.tolerance:
        said = f"relative error {run.error:.1g}"
        assert run.provider.kind != "ours", f"{run.provider.name}: {said}"
        run.note = "; ".join(filter(None, (run.note, said)))
        if not run.error <= WRONG:
            run.status = "wrong"


def _first_round(case: Case, run: Run) -> None:
    if run.status in ("failed", "left out"):
        return
    settle(case)
    seconds, run.extra = timed_with_memory(run.call)
    run.seconds.append(seconds)
    run.rounds = 1 if case.once else _rounds(seconds)


def _others_turn(case: Case, ours: Run, others: list[Run], turn: int) -> None:
    for run in others:
        # spread evenly over the rounds of ours, or several a round
        due = -(-run.rounds * (turn + 1) // max(ours.rounds, 1))
        while run.status in ("ok", "wrong") and len(run.seconds) < min(due, run.rounds):
            settle(case)
            run.seconds.append(timed(run.call))
    settle(case)


def _attempt(run: Run, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:  # a peer may fail in any way: its class goes into the table
        message = str(error).strip().splitlines()
        run.status = "failed"
        run.note = ": ".join([type(error).__name__, *message[:1]])[:160]
        run.call = lambda: None
    if DEVICE.type == "cuda" and run.status == "failed":
        torch.cuda.empty_cache()


def _record(case: Case, run: Run, foreign_cores: float) -> dict[str, Any]:
    provider = run.provider
    done = run.status in ("ok", "wrong")
    return case.record | {
        "provider": provider.name,
        "kind": provider.kind,
        "status": run.status,
        "note": run.note,
        "seconds": min(run.seconds) if done else None,
        "median": statistics.median(run.seconds) if done else None,
        "rounds": len(run.seconds),
        "once": case.once,
        "extra": run.extra + provider.held if done else None,
        "error": run.error,
        "traffic": provider.traffic,
        "flops": provider.flops,
        "foreign_cores": foreign_cores,
    }
