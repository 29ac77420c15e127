"""The peers' entry points on our kernels and on their own, where the peers are installed: a step of
TRL's GRPOTrainer from scored samples on (forward, loss, backward), and Liger's functions. What to
expect is in docs/performance.md.

    pytest bench/test_bench_compat.py -k 128x8x32000
"""

from __future__ import annotations

import pytest

from bench.compat import (
    ENTRY_POINTS,
    FROM_LOGITS,
    Padded,
    Step,
    padded_measurement,
    step_measurement,
)
from bench.machine import DEVICE
from bench.peers import installed


def test_trl_step(benchmark, session, step_case):
    if not installed("trl"):
        session.leave_out(f"trl step, {step_case}", "trl is not installed")
    session.admit(step_case)
    session.measure(*step_measurement(Step(step_case)), benchmark)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_liger(benchmark, session, entry_point, padded_case):
    if not installed("liger_kernel"):
        session.leave_out(f"{entry_point}, {padded_case}", "liger-kernel is not installed")
    if entry_point in FROM_LOGITS and DEVICE.type == "cpu":
        session.leave_out(entry_point, "Liger's own is a Triton kernel and needs a GPU")
    session.admit(padded_case)
    session.measure(*padded_measurement(Padded(padded_case, entry_point)), benchmark)
