"""Options, the session that collects records, and the tables at the end."""

from __future__ import annotations

import gc
import os
import time
from typing import Any, NoReturn

import pytest

from bench import cases, machine, tables
from bench.measure import measure


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--grid", action="store_true", help="the whole grid, not the headline shapes")
    group.addoption(
        "--providers",
        default="",
        help="comma-separated beginnings of the providers to measure (ours is always), "
        "for example: eager,liger",
    )
    group.addoption(
        "--time-limit",
        type=float,
        default=float("inf"),
        help="seconds after which no further case is begun; those left out are named",
    )


Case = cases.RowCase | cases.LinearCase | cases.GroupCase | cases.PaddedCase


class Session:
    """Everything that a run measured or left out."""

    def __init__(self, config: pytest.Config) -> None:
        self.began = time.monotonic()
        self.limit = config.getoption("--time-limit")
        names = config.getoption("--providers")
        self.wanted = tuple(names.split(",")) if names else ()
        self.foreign = machine.ForeignLoad()
        self.load_at_start = os.getloadavg()[0]
        self.records: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def admit(self, case: Case) -> None:
        """Skips the test, and says why in the report, where the case cannot be measured."""
        gc.collect()  # the case before may be held by a cycle
        budget = machine.memory_budget()
        if time.monotonic() - self.began > self.limit:
            self.leave_out(str(case), f"after the time limit of {self.limit:g} s")
        if case.needs > budget:
            needed = f"{case.needs / 1e9:.1f} GB, may use {budget / 1e9:.1f}"
            self.leave_out(str(case), f"needs at least {needed}")

    def leave_out(self, name: str, why: str) -> NoReturn:
        """Skips the test; the report names what was left out."""
        self.left_out[name] = why
        pytest.skip(f"{name}: {why}")

    def measure(self, case, providers, benchmark) -> None:
        kept = [
            p
            for p in providers
            if not self.wanted or p.kind in ("ours", "floor") or p.name.startswith(self.wanted)
        ]
        self.records += measure(case, kept, benchmark)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": tables.FORMAT,
            "machine": machine.describe(),
            "load_at_start": round(self.load_at_start, 2),
            "load_at_end": round(os.getloadavg()[0], 2),
            "foreign_cores": round(self.foreign.cores(), 2),
            "records": self.records,
            "left_out": self.left_out,
        }


SESSION = pytest.StashKey[Session]()


def pytest_configure(config):
    config.stash[SESSION] = Session(config)
    # the tables below replace pytest-benchmark's, which would show ours alone
    config.option.benchmark_columns = ["min", "median", "rounds"]
    config.option.benchmark_sort = "name"


def pytest_report_header(config):
    load = config.stash[SESSION].load_at_start
    busy = f": warning, above {tables.QUIET}, ratios may be off" if load > tables.QUIET else ""
    return f"load average {load:.2f}{busy}"


@pytest.fixture(scope="session")
def session(pytestconfig):
    return pytestconfig.stash[SESSION]


def pytest_generate_tests(metafunc):
    grid = metafunc.config.getoption("--grid")
    for name, find in (
        ("row_case", cases.row_cases),
        ("linear_case", cases.linear_cases),
        ("update_case", cases.update_cases),
        ("generation_case", cases.generation_cases),
        ("step_case", cases.step_cases),
        ("padded_case", cases.padded_cases),
    ):
        if name in metafunc.fixturenames:
            found = find(machine.DEVICE.type, grid)
            ids = [str(case).replace(" x ", "x").replace(" ", "-") for case in found]
            metafunc.parametrize(name, found, ids=ids, scope="module")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["regrpo"] = config.stash[SESSION].as_json()


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if session.records or session.left_out:
        terminalreporter.write_line("")
        terminalreporter.write(tables.render(session.as_json()))
