"""Two turns of a group with an observation in between: ours, with keys and values kept, and
transformers' generate.

    pytest bench/test_bench_generation.py -k 1024x8x32000
"""

from __future__ import annotations

import pytest

from bench.generation import Rollout, generation_measurement


@pytest.fixture(scope="module")
def rollout(generation_case, session):
    session.admit(generation_case)
    made = Rollout(generation_case)
    yield made
    made.__dict__.clear()


def test_generation(benchmark, session, rollout):
    session.measure(*generation_measurement(rollout), benchmark)
