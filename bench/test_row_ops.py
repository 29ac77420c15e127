"""token_log_probs and grpo_loss (forward and backward) against eager PyTorch, torch.compile of it
and the peers that are installed.

    pytest bench/                            the headline shapes
    pytest bench/ --grid -k "151936 and row" a part of the grid
    pytest bench/ --providers ours,eager     some of the ways
    pytest bench/ --benchmark-json=run.json  for `python -m bench.report run.json`
"""

from __future__ import annotations

import pytest

from bench.machine import DEVICE
from bench.measure import timed_with_memory
from bench.rows import OPS, Batch, row_measurement
from regrpo_kernels import grpo_loss


@pytest.fixture(scope="module")
def batch(row_case, session):
    session.admit(row_case)
    made = Batch(row_case)
    yield made
    made.__dict__.clear()  # before the next one is made: one batch in memory at a time


@pytest.mark.parametrize("op", OPS)
def test_row_op(benchmark, session, batch, op):
    session.measure(*row_measurement(op, batch), benchmark)


def test_inplace_uses_no_memory_for_the_logits(batch):
    """The stated bound, checked where it is measured: under 1 % of the logits."""

    def call():
        out = grpo_loss(batch.logits, batch.labels, batch.advantages, inplace=True)
        out.loss.backward()

    if batch.case.nbytes < 64 << 20:
        pytest.skip("too small beside what an allocator keeps")
    batch.restore()
    call()
    batch.restore()
    _, extra = timed_with_memory(call)
    batch.restore()
    assert extra < 0.01 * batch.original.nbytes, DEVICE
