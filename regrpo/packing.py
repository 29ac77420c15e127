"""Variable-length sequences -> packed batches without padding.

Labels are shifted here, once: position t of a sequence predicts its token t + 1, and everything in
a ``PackedBatch`` that speaks of a prediction (``labels, segment_ids, loss_mask, advantages,
old_log_probs, ref_log_probs``) is aligned with the position that makes it. The last position of a
sequence predicts nothing, so sequences in a pack never predict each other.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from regrpo.images import Image, ImageRows, image_rows, rotary_positions
from regrpo.prefix_tree import PrefixTree, prefix_order, prefix_tree
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment, packing

IGNORE_INDEX = -100
TRAINED = (int(Segment.ACTION), int(Segment.REFLECTION))


@dataclass(frozen=True)
class PackedBatch:
    """``T`` packed tokens of ``B`` sequences.

    Attributes:
        input_ids, labels: int64 [T]; labels hold -100 where nothing is predicted.
        position_ids: int64 [T], or [3, T] of a batch with images (time, height, width).
        segment_ids: int64 [T], the ``Segment`` of the *predicted* token.
        loss_mask: bool [T], the predicted token is ACTION or REFLECTION.
        cu_seqlens: int32 [B + 1], where sequences start.
        max_seqlen: tokens of the longest.
        advantages, old_log_probs, ref_log_probs: float32 [T], or None where not used (SFT).
        tree: which of the tokens are computed together; None where each is computed by itself.
        images: at the image tokens among the rows that are computed; None without any.
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
    tree: PrefixTree | None = None
    images: ImageRows | None = None

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with all of its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor | PrefixTree | ImageRows)
        }
        return replace(self, **moved)

    def computed(self, rows: torch.Tensor) -> torch.Tensor:
        """Which rows of the hidden states belong to tokens ``rows``."""
        return rows if self.tree is None else self.tree.source.index_select(0, rows)


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Partitions indices into packs of at most ``budget`` tokens (best-fit decreasing).

    Raises:
        ValueError: a sequence longer than the budget, named by its index.
    """
    packs = packing.best_fit_decreasing(lengths, budget)
    order = packs.order.tolist()
    return [order[start:stop] for start, stop in itertools.pairwise(packs.cu_packs.tolist())]


def pack_groups(
    groups: Sequence[Sequence[int]], trajectories: Sequence[TokenizedTrajectory], budget: int
) -> list[list[int]]:
    """Packs whole groups by the tokens that they compute once what they share is counted once.

    Args:
        groups: indices of trajectories that begin alike.
        budget: computed tokens of a pack, at most. A group of more is split by its branches.

    Raises:
        ValueError: a trajectory longer than the budget, named by its index.
    """
    parts: list[list[int]] = []
    lengths: list[int] = []
    for group in groups:
        for part in _within(group, trajectories, budget):
            parts.append(part)
            lengths.append(_computed(part, trajectories))
    packs = best_fit_decreasing(lengths, budget)
    return [[i for part in pack for i in parts[part]] for pack in packs]


def _computed(indices: Sequence[int], trajectories: Sequence[TokenizedTrajectory]) -> int:
    return len(prefix_tree([trajectories[i].input_ids for i in indices]))


def _within(
    group: Sequence[int], trajectories: Sequence[TokenizedTrajectory], budget: int
) -> list[list[int]]:
    """The group, or parts of it that share as much as they can, within the budget."""
    for i in group:
        if len(trajectories[i]) > budget:
            raise ValueError(
                f"trajectory {i} has {len(trajectories[i])} tokens; "
                f"expected at most the budget of {budget}"
            )
    if _computed(group, trajectories) <= budget:
        return [list(group)]
    parts: list[list[int]] = [[]]
    for place in prefix_order([np.asarray(trajectories[i].input_ids) for i in group]):
        if _computed([*parts[-1], group[place]], trajectories) > budget:
            parts.append([])
        parts[-1].append(group[place])
    return parts


def collate(
    trajectories: Sequence[TokenizedTrajectory],
    *,
    with_old_log_probs: bool = False,
    share: bool = False,
) -> PackedBatch:
    """Packs trajectories in the order given.

    Args:
        with_old_log_probs: takes the trajectories' ``log_probs``, which all of them must have.
        share: adds the prefix tree: what trajectories have in common is computed once.
    """
    lengths = torch.tensor([0, *(len(t) for t in trajectories)])
    cu_seqlens = lengths.cumsum(0)
    tree = prefix_tree([t.input_ids for t in trajectories]) if share else None
    ids = torch.tensor([i for t in trajectories for i in t.input_ids], dtype=torch.int64)
    positions = torch.arange(len(ids)) - cu_seqlens[:-1].repeat_interleave(lengths[1:])
    seen = None
    images: dict[int, Image] = {}
    for t in trajectories:
        images |= t.images
    if images:
        each = [rotary_positions(t.input_ids, t.images) for t in trajectories]
        positions = torch.from_numpy(np.concatenate(each, axis=1))
        ids, seen, tree = _with_images(ids, positions, images, tree)
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
        position_ids=positions,
        labels=shift(ids, IGNORE_INDEX),
        segment_ids=segment_ids,
        loss_mask=torch.isin(segment_ids, torch.tensor(TRAINED)),
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=int(lengths.max()),
        old_log_probs=old,
        tree=tree,
        images=seen,
    )


def _with_images(
    ids: torch.Tensor,
    positions: torch.Tensor,
    images: Mapping[int, Image],
    tree: PrefixTree | None,
) -> tuple[torch.Tensor, ImageRows | None, PrefixTree | None]:
    """Keys of images become the model's tokens, of the batch and of its tree."""
    shown, seen = image_rows((ids if tree is None else tree.input_ids).numpy(), images)
    rows = torch.from_numpy(shown)
    if tree is None:
        return rows, seen, None
    tree = replace(tree, input_ids=rows, position_ids=positions[:, tree.tokens])
    return rows[tree.source], seen, tree


def blank() -> PackedBatch:
    """A pack of one token, of which nothing is trained."""
    batch = collate([TokenizedTrajectory([0], [int(Segment.CONTEXT)])], share=True)
    zeros = torch.zeros(1)
    return replace(batch, advantages=zeros, old_log_probs=zeros, ref_log_probs=zeros)
