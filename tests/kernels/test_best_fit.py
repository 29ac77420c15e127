"""best_fit_decreasing against its definition, one sequence after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrpo_kernels import best_fit_decreasing


def by_definition(lengths, budget):
    packs = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [budget - sum(lengths[i] for i in pack) for pack in packs]
        fitting = [p for p in range(len(packs)) if room[p] >= lengths[index]]
        if fitting:
            packs[min(fitting, key=lambda p: (room[p], p))].append(index)
        else:
            packs.append([index])
    return packs


def packed(lengths, budget):
    order, cu_packs = best_fit_decreasing(lengths, budget)
    assert order.dtype == cu_packs.dtype == torch.int64
    assert cu_packs[0] == 0
    return [p.tolist() for p in order.split(cu_packs.diff().tolist())] if len(order) else []


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(0, 60))
def test_packs_are_those_of_the_definition(data, budget):
    lengths = data.draw(st.lists(st.integers(0, budget), max_size=80))
    assert packed(lengths, budget) == by_definition(lengths, budget)


@pytest.mark.parametrize("budget", [7, 100, 1 << 40])
def test_many_open_packs(budget):
    """Enough that blocks of open packs fill, split and empty."""
    generator = torch.Generator().manual_seed(budget)
    lengths = torch.randint(0, budget + 1, (2500,), generator=generator)
    lengths[::7] = budget // 2 + 1  # packs that nothing long joins
    assert packed(lengths, budget) == by_definition(lengths.tolist(), budget)


def test_equal_lengths_keep_their_order_and_packs_theirs():
    assert packed([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert packed([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]
    assert packed([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert packed([0, 10, 0], 10) == [[1, 0, 2]]
    assert packed([0, 0], 0) == [[0, 1]]
    assert packed([], 10) == []


def test_any_integer_dtype_and_view():
    lengths = torch.tensor([6, 99, 5, 99, 4, 99, 3, 99, 2, 99])
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert packed(lengths.to(dtype)[::2], 10) == [[0, 2], [1, 3, 4]]


def test_what_does_not_fit_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"sequence 2 has 13 tokens.*at most the budget of 11"):
        best_fit_decreasing([3, 12, 13, 13], 11)
    with pytest.raises(ValueError, match=r"lengths\[1\] = -1"):
        best_fit_decreasing([3, -1], 11)
    with pytest.raises(ValueError, match=r"shape \[N\], got \[1, 2\]"):
        best_fit_decreasing(torch.tensor([[1, 2]]), 11)
    with pytest.raises(ValueError, match=r"on the CPU, got a tensor on meta"):
        best_fit_decreasing(torch.ones(2, dtype=torch.int64, device="meta"), 11)
    with pytest.raises(TypeError, match=r"integer dtype, got torch.float32"):
        best_fit_decreasing([1.0, 2.0], 11)
