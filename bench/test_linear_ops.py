"""linear_grpo_loss (forward and backward) and linear_token_log_probs (forward) against eager, which
holds the logits, torch.compile of it and the peers that are installed.
"""

from __future__ import annotations

import pytest

from bench.cases import memory_case
from bench.linear import OPS, Batch, linear_measurement
from bench.machine import DEVICE


@pytest.fixture(scope="module")
def batch(linear_case, session):
    session.admit(linear_case)
    made = Batch(linear_case)
    yield made
    made.__dict__.clear()


@pytest.mark.parametrize("op", OPS)
def test_linear_op(benchmark, session, batch, op):
    if op == "linear_token_log_probs" and batch.case.head == "frozen":
        pytest.skip("the forward pass is that of a trained head")
    session.measure(*linear_measurement(op, batch), benchmark)


def test_memory_of_a_long_batch(benchmark, session):
    """The peak, measured, of one call at a size where eager's logits are 5 GB in fp32."""
    case = memory_case(DEVICE.type)
    session.admit(case)
    session.measure(*linear_measurement("linear_grpo_loss", Batch(case)), benchmark)
