"""One update of the trainer, from samples to gradients: ours with and without shared context, the
loop of the official trainer, and TRL's GRPOTrainer where it is installed.

    pytest bench/test_bench_trainer.py --grid -k 256x5x32000
"""

from __future__ import annotations

import pytest

from bench.trainer import Update, update_measurement


@pytest.fixture(scope="module")
def update(update_case, session):
    session.admit(update_case)
    made = Update(update_case)
    yield made
    made.__dict__.clear()


def test_update(benchmark, session, update):
    session.measure(*update_measurement(update), benchmark)
