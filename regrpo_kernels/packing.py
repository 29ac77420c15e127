"""Sequences -> packs of at most so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import compiled, pointer


class Packs(NamedTuple):
    """A partition of N sequences into P packs.

    Attributes:
        order: int64 [N], the indices of the sequences, pack by pack.
        cu_packs: int64 [P + 1]; pack p holds `order[cu_packs[p] : cu_packs[p + 1]]`.
    """

    order: Tensor
    cu_packs: Tensor


def best_fit_decreasing(lengths: Tensor | Sequence[int], budget: int) -> Packs:
    """Packs sequences by best-fit decreasing.

    The longest sequence comes first, of equal ones that of the lowest index; each goes into the
    fullest pack that still has room for it, of equally full ones the oldest, or opens a new pack.
    Packs come in the order in which they were opened, and hold sequences in the order in which they
    came. For many sequences that is at most 11/9 of the fewest packs possible (Johnson et al.,
    SIAM J. Comput. 3, 1974). Runs on the host, in C++, with the GIL released.

    Args:
        lengths: tokens of each sequence, `[N]`, integers of 0 or more; a tensor is on the CPU.
        budget: tokens of a pack, at most.

    Raises:
        ValueError: a sequence is longer than the budget, named by its index (the longest one); a
            negative length; a wrong shape or device.
        TypeError: lengths are no integers.
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device="cpu")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have shape [N], got {list(lengths.shape)}")
    if lengths.device.type != "cpu":
        raise ValueError(f"lengths must be on the CPU, got a tensor on {lengths.device}")
    if not lengths.numel():
        return Packs(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must have an integer dtype, got {lengths.dtype}")
    lengths = lengths.to(torch.int64).contiguous()
    if lengths.min() < 0:
        index = int(lengths.argmin())
        raise ValueError(f"lengths must be 0 or more, got lengths[{index}] = {lengths[index]}")
    order = torch.empty_like(lengths)
    cu_packs = lengths.new_empty(len(lengths) + 1)
    packs = compiled().best_fit_decreasing(
        sequences=len(lengths),
        lengths=pointer(lengths),
        budget=budget,
        order=pointer(order),
        cu_packs=pointer(cu_packs),
    )
    return Packs(order, cu_packs[: packs + 1].clone())
