"""Packing: budgets, alignment, and labels that never cross sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrpo.packing import IGNORE_INDEX, best_fit_decreasing, collate
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 60))
def test_packs_are_a_partition_within_the_budget(lengths, budget):
    too_long = [i for i, n in enumerate(lengths) if n > budget]
    if too_long:
        # The longest is looked at first.
        worst = max(too_long, key=lambda i: lengths[i])
        with pytest.raises(
            ValueError, match=rf"sequence {worst} has {lengths[worst]} tokens.*{budget}"
        ):
            best_fit_decreasing(lengths, budget)
        return
    packs = best_fit_decreasing(lengths, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(total <= budget for total in sums)
    # Any-fit: no two packs fit into one; so at most twice the optimum.
    if len(packs) > 1:
        assert sum(sorted(sums)[:2]) > budget or 0 in sums


def test_best_fit_takes_the_fullest_pack_that_still_has_room():
    assert best_fit_decreasing([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([5, 9, 1], 10) == [[1, 2], [0]]
    assert best_fit_decreasing([], 10) == []


def trajectory(ids, kinds, log_probs=None):
    return TokenizedTrajectory(list(ids), [int(k) for k in kinds], list(log_probs or []))


C, A, SEEN, R = Segment.CONTEXT, Segment.ACTION, Segment.OBSERVATION, Segment.REFLECTION
MIXED = [
    trajectory([10, 11, 12, 13], [C, C, A, A], [0, 0, -1, -2]),
    trajectory([], []),
    trajectory([20], [C], [0]),
    trajectory([30, 31, 32, 33, 34], [C, R, A, SEEN, A], [0, -3, -4, 0, -5]),
]


def test_everything_is_aligned_with_the_position_that_predicts():
    batch = collate(MIXED, with_old_log_probs=True)
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 20, 30, 31, 32, 33, 34]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    assert batch.labels.tolist() == [11, 12, 13, -100, -100, 31, 32, 33, 34, -100]
    assert batch.segment_ids.tolist() == [C, A, A, C, C, R, A, SEEN, A, C]
    assert batch.loss_mask.tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 1, 0]
    assert batch.old_log_probs.tolist() == [0, -1, -2, 0, 0, -3, -4, 0, -5, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 4, 5, 10]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.loss_mask.dtype == torch.bool
    assert batch.max_seqlen == 5
    assert batch.advantages is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=8))
def test_labels_never_cross_sequences(kinds):
    starts = [100 * i for i in range(len(kinds))]
    batch = collate(
        [trajectory(range(s, s + len(k)), k) for s, k in zip(starts, kinds, strict=True)]
    )
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    for token, label in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert label in (token + 1, IGNORE_INDEX)
    predicted = {label for label in batch.labels.tolist() if label != IGNORE_INDEX}
    assert predicted == {
        s + t for s, k in zip(starts, kinds, strict=True) for t in range(1, len(k))
    }
    assert not (batch.loss_mask & (batch.labels == IGNORE_INDEX)).any()
    for start, stop in zip(
        batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True
    ):
        assert batch.position_ids[start:stop].tolist() == list(range(stop - start))
    assert batch.max_seqlen == max(map(len, kinds), default=0)


def test_packs_hold_what_one_by_one_batches_hold():
    whole = collate(MIXED, with_old_log_probs=True)
    parts = [collate([t], with_old_log_probs=True) for t in MIXED]
    for name in (
        "input_ids",
        "position_ids",
        "labels",
        "segment_ids",
        "loss_mask",
        "old_log_probs",
    ):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts])), name


def test_to_moves_every_tensor():
    batch = collate(MIXED, with_old_log_probs=True).to("meta")
    tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 7
    assert all(t.device.type == "meta" for t in tensors)
    assert batch.max_seqlen == 5
