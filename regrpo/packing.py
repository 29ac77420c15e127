"""Variable-length sequences -> packed batches without padding.

Labels are shifted here, once: position t of a sequence predicts its token t + 1, and everything in
a ``PackedBatch`` that speaks of a prediction (``labels, segment_ids, loss_mask, advantages,
old_log_probs, ref_log_probs``) is aligned with the position that makes it. The last position of a
sequence predicts nothing, so sequences in a pack never predict each other.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment, packing

IGNORE_INDEX = -100
TRAINED = (int(Segment.ACTION), int(Segment.REFLECTION))


@dataclass(frozen=True)
class PackedBatch:
    """``T`` packed tokens of ``B`` sequences.

    Attributes:
        input_ids, position_ids, labels: int64 [T]; labels hold -100 where nothing is predicted.
        segment_ids: int64 [T], the ``Segment`` of the *predicted* token.
        loss_mask: bool [T], the predicted token is ACTION or REFLECTION.
        cu_seqlens: int32 [B + 1], where sequences start. max_seqlen: the longest.
        advantages, old_log_probs, ref_log_probs: float32 [T], or None where not used (SFT).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segment_ids: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    advantages: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    ref_log_probs: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Partitions indices into packs of at most ``budget`` tokens (best-fit decreasing).

    Raises:
        ValueError: a sequence longer than the budget, named by its index.
    """
    packs = packing.best_fit_decreasing(lengths, budget)
    order = packs.order.tolist()
    return [order[start:stop] for start, stop in itertools.pairwise(packs.cu_packs.tolist())]


def collate(
    trajectories: Sequence[TokenizedTrajectory], *, with_old_log_probs: bool = False
) -> PackedBatch:
    """Packs trajectories in the order given."""
    lengths = torch.tensor([0, *(len(t) for t in trajectories)])
    cu_seqlens = lengths.cumsum(0)
    ids = torch.tensor([i for t in trajectories for i in t.input_ids], dtype=torch.int64)
    kinds = torch.tensor([k for t in trajectories for k in t.segment_ids], dtype=torch.int64)
    last = cu_seqlens[1:][lengths[1:] > 0] - 1

    def shift(x: torch.Tensor, fill: float) -> torch.Tensor:
        shifted = torch.roll(x, -1)
        shifted[last] = fill
        return shifted

    old = None
    if with_old_log_probs:
        old = torch.tensor([p for t in trajectories for p in t.log_probs], dtype=torch.float32)
        old = shift(old, 0.0)
    segment_ids = shift(kinds, int(Segment.CONTEXT))
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)) - cu_seqlens[:-1].repeat_interleave(lengths[1:]),
        labels=shift(ids, IGNORE_INDEX),
        segment_ids=segment_ids,
        loss_mask=torch.isin(segment_ids, torch.tensor(TRAINED)),
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=int(lengths.max()),
        old_log_probs=old,
    )
