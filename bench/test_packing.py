"""Best-fit decreasing over a million sequences, and the packs' fill.

pytest bench/test_packing.py
"""

from __future__ import annotations

import pytest
import torch

from regrpo_kernels import best_fit_decreasing

COUNT = 1_000_000


def lengths_of(name: str, budget: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "uniform":  # half of them are alone with small ones: most packs are open for long
        return torch.randint(1, budget + 1, (COUNT,), generator=generator)
    lengths = (6.5 + 0.8 * torch.randn(COUNT, generator=generator)).exp()
    return lengths.clamp(1, budget).long()


@pytest.mark.parametrize("budget", [16384, 1 << 20, 1 << 40])
@pytest.mark.parametrize("name", ["lognormal", "uniform"])
def test_a_million_sequences(benchmark, name, budget):
    lengths = lengths_of(name, budget)
    packs = benchmark.pedantic(best_fit_decreasing, (lengths, budget), rounds=3)
    tokens, count = int(lengths.sum()), len(packs.cu_packs) - 1
    benchmark.extra_info["packs"] = count
    benchmark.extra_info["fill"] = tokens / (count * budget)
