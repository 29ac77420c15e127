"""grpo_loss over batches: packing, aggregation, micro-batches, bad arguments."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_gradient, grpo_loss64
from test_grpo_loss import make_batch, run

from regrpo_kernels import Objective, grpo_loss
from regrpo_kernels.objective import LOSS_AGG_MODES

LENGTHS = [5, 0, 1, 7, 3]  # an empty sequence, and one without trained tokens (the last)


def objective_of(mode, **options):
    length = 11 if mode == "seq-mean-token-sum-norm" else None
    return Objective(loss_agg_mode=mode, max_completion_length=length, **options)


def packed_batch():
    batch = make_batch(sum(LENGTHS), 63)
    batch["loss_mask"][-3:] = False
    batch["loss_mask"][5] = True
    batch["advantages"] = torch.randn(len(LENGTHS))
    batch["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return batch


def weights_of(mode, mask):
    """From the definition, sequence by sequence."""
    parts, trained = mask.split(LENGTHS), sum(bool(m.any()) for m in mask.split(LENGTHS))
    weights = {
        "token-mean": lambda m: m / mask.sum(),
        "seq-mean-token-sum": lambda m: m / trained,
        "seq-mean-token-mean": lambda m: m / max(m.sum(), 1) / trained,
        "seq-mean-token-sum-norm": lambda m: m / 11 / trained,
    }[mode]
    return torch.cat([weights(m) for m in parts])


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_packed_equals_padded_equals_one_by_one(implementation, mode):
    objective = objective_of(mode, beta=0.1)
    batch = packed_batch()
    out, gradient = run(implementation, **batch, objective=objective)

    lengths = torch.tensor(LENGTHS)
    per_token = batch["advantages"].repeat_interleave(lengths)
    loss, expected = grpo_loss64(
        batch["logits"],
        batch["labels"],
        weights_of(mode, batch["loss_mask"]),
        per_token,
        batch["old_log_probs"],
        batch["ref_log_probs"],
        beta=0.1,
    )
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss, rtol=2e-6, atol=2e-6)
    assert_gradient(gradient, expected, torch.float32)

    inside = torch.arange(max(LENGTHS)) < lengths[:, None]

    def pad(packed, fill):
        padded = torch.full((*inside.shape, *packed.shape[1:]), fill, dtype=packed.dtype)
        padded[inside] = packed
        return padded

    padded = {
        "logits": pad(batch["logits"], float("nan")),
        "labels": pad(batch["labels"], -100),
        "advantages": batch["advantages"],
        "old_log_probs": pad(batch["old_log_probs"], float("nan")),
        "ref_log_probs": pad(batch["ref_log_probs"], float("nan")),
        "loss_mask": pad(batch["loss_mask"], True),
    }
    padded_out, padded_gradient = run(implementation, **padded, objective=objective)
    torch.testing.assert_close(padded_out.loss, out.loss)
    torch.testing.assert_close(padded_gradient[inside], gradient)
    assert (padded_gradient[~inside] == 0).all()

    # one sequence at a time, each told the count of the whole batch
    mask = batch["loss_mask"]
    trained = sum(bool(m.any()) for m in mask.split(LENGTHS))
    normalizer = mask.sum() if mode == "token-mean" else trained
    total, parts, start = 0.0, [], 0
    for i, length in enumerate(LENGTHS):
        rows = slice(start, start + length)
        start += length
        one = {k: v[rows] for k, v in batch.items() if k not in ("advantages", "cu_seqlens")}
        one["advantages"] = batch["advantages"][i : i + 1]
        one["cu_seqlens"] = torch.tensor([0, length])
        part, part_gradient = run(implementation, **one, objective=objective, normalizer=normalizer)
        total = total + part.loss.detach()
        parts.append(part_gradient)
    torch.testing.assert_close(total, out.loss.detach())
    torch.testing.assert_close(torch.cat(parts), gradient)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 15), max_size=4, unique=True), st.sampled_from(LOSS_AGG_MODES[:1]))
def test_any_split_into_micro_batches_gives_the_same_gradient(cuts, mode):
    torch.manual_seed(1)
    batch = make_batch(16, 63)
    normalizer = batch["loss_mask"].sum()
    cpu = ("cpu", "cpu", None)
    out, gradient = run(cpu, **batch, objective=objective_of(mode))
    bounds = [0, *sorted(cuts), 16]
    total, parts = 0.0, []
    for begin, end in pairwise(bounds):
        piece = {k: v[begin:end] for k, v in batch.items()}
        part, part_gradient = run(cpu, **piece, objective=objective_of(mode), normalizer=normalizer)
        total = total + part.loss.detach()
        parts.append(part_gradient)
    torch.testing.assert_close(total, out.loss.detach())
    torch.testing.assert_close(torch.cat(parts), gradient)


T, V = 6, 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"labels": torch.tensor([0, 1, 2, 9, 0, 0])}, ValueError, r"labels\[3\] = 9 is out of"),
        ({"logits": torch.zeros(T, V).double()}, TypeError, "logits must have one of the dtypes"),
        ({"logits": torch.zeros(V, T).t()}, ValueError, "contiguous in the vocabulary"),
        ({"logits": torch.zeros(1, V).expand(T, V)}, ValueError, "must not be expanded"),
        ({"advantages": None}, ValueError, "advantages are needed by policy 'clip'"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must have shape \[6\] or \[2\]"),
        ({"advantages": torch.zeros(T).long()}, TypeError, "advantages must have a floating"),
        ({"old_log_probs": torch.zeros(5)}, ValueError, "old_log_probs must have the shape"),
        ({"ref_log_probs": torch.zeros(5)}, ValueError, "ref_log_probs must have the shape"),
        ({"loss_mask": torch.zeros(5)}, ValueError, "loss_mask must have the shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens must rise from 0 to T = 6"),
        ({"cu_seqlens": torch.tensor([0, 8, 6])}, ValueError, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must have dtype"),
        ({"cu_seqlens": torch.tensor([6])}, ValueError, "cu_seqlens must have shape"),
        (
            {"cu_seqlens": None, "advantages": torch.zeros(2)},
            ValueError,
            "together with cu_seqlens",
        ),
        (
            {"cu_seqlens": None, "objective": Objective(loss_agg_mode="seq-mean-token-sum")},
            ValueError,
            "cu_seqlens is needed",
        ),
        ({"impl": "reference"}, ValueError, "inplace=True is not available"),
        ({"impl": "cuda"}, (RuntimeError, ValueError), "impl='cuda'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_arguments_raise_before_anything_is_written(change, error, message):
    arguments = {
        "logits": torch.randn(T, V),
        "labels": torch.zeros(T, dtype=torch.int64),
        "advantages": torch.zeros(T),
        "cu_seqlens": torch.tensor([0, 2, 6]),
        "inplace": True,
    } | change
    logits = arguments["logits"].requires_grad_()
    before = logits.detach().clone()
    with pytest.raises(error, match=message):
        grpo_loss(**arguments)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "ppo"}, "Objective.policy must be one of"),
        ({"ratio_level": "row"}, "Objective.ratio_level must be one of"),
        ({"kl_estimator": "k4"}, "Objective.kl_estimator must be one of"),
        ({"loss_agg_mode": "mean"}, "Objective.loss_agg_mode must be one of"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "max_completion_length is needed"),
        ({"temperature": 0.0}, "Objective.temperature must be greater than 0"),
        ({"delta": -1.0}, "Objective.delta must be None or greater than 0"),
        ({"epsilon_low": -0.1}, "Objective.epsilon_low must be 0 or greater"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_objectives(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_objective_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().beta = 1.0
