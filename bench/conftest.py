"""Collects every measurement of a run and prints one table at the end."""

from __future__ import annotations

import pytest
import torch

ROWS: list[dict] = []


def pytest_configure(config):
    # the terminal table below replaces pytest-benchmark's, whose columns do not fit
    config.option.benchmark_columns = ["min", "median", "rounds"]
    config.option.benchmark_sort = "name"


@pytest.fixture
def record():
    return ROWS.append


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    best = {(r["op"], r["shape"], r["dtype"], r["provider"]): r["seconds"] for r in ROWS}
    write = terminalreporter.write_line
    write("")
    write(
        f"device {ROWS[0]['device']}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; "
        "best of the rounds; GB/s counts one read of the logits (token_log_probs) or one read and "
        "one write (grpo_loss, copy)"
    )
    write(
        f"{'op':16} {'shape':13} {'dtype':9} {'provider':14} {'ms':>8} {'GB/s':>6} "
        f"{'extra MB':>9} {'of logits':>9} {'x eager':>8} {'x compile':>9}"
    )
    for r in ROWS:
        key = (r["op"], r["shape"], r["dtype"])
        against = [
            f"{best[(*key, other)] / r['seconds']:.1f}" if (*key, other) in best else "-"
            for other in ("eager", "torch.compile")
        ]
        write(
            f"{r['op']:16} {r['shape']:13} {r['dtype']:9} {r['provider']:14} "
            f"{1e3 * r['seconds']:8.1f} {r['bytes'] / r['seconds'] / 1e9:6.1f} "
            f"{r['extra'] / 1e6:9.1f} {100 * r['extra'] / r['logits']:8.1f}% "
            f"{against[0]:>8} {against[1]:>9}"
        )
