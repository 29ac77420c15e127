"""What a loss takes beside the logits: checks, and a mask, weight and advantage for each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import IGNORE_INDEX, check_device
from regrpo_kernels.objective import Objective


class TokenInputs(NamedTuple):
    """Per-token inputs, all shaped like the labels."""

    mask: Tensor  # bool: trained
    weights: Tensor  # fp32: loss = sum_t weights_t loss_t
    advantages: Tensor | None
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    ratio_bounds: Tensor | None  # int64 [B + 1] over flattened tokens: sequence-level ratios


def prepare_tokens(
    labels: Tensor,
    advantages: Tensor | None,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    objective: Objective,
    normalizer: float | Tensor | None,
) -> TokenInputs:
    """Checks the arguments of `grpo_loss` and brings them to one value a token."""
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, labels)
    for name, tensor in (
        ("old_log_probs", old_log_probs),
        ("ref_log_probs", ref_log_probs),
        ("loss_mask", loss_mask),
    ):
        if tensor is not None:
            if tensor.shape != labels.shape:
                raise ValueError(
                    f"{name} must have the shape of labels {list(labels.shape)}, "
                    f"got {list(tensor.shape)}"
                )
            check_device(name, tensor, labels)
    per_sequence = _per_sequence_advantages(advantages, labels, cu_seqlens, objective)
    needs_sequences = (
        per_sequence
        or objective.loss_agg_mode != "token-mean"
        or objective.ratio_level == "sequence"
    )
    if needs_sequences and labels.dim() == 1 and cu_seqlens is None:
        raise ValueError(
            "cu_seqlens is needed for packed logits [T, V] by per-sequence advantages, by "
            f"loss_agg_mode={objective.loss_agg_mode!r} and by "
            f"ratio_level={objective.ratio_level!r}; got None"
        )
    mask = labels != IGNORE_INDEX
    if loss_mask is not None:
        mask = mask & (loss_mask != 0)
    token_sequence = (
        sequence_ids(cu_seqlens, labels.shape[0])
        if needs_sequences and cu_seqlens is not None
        else None
    )
    weights = loss_weights(mask, objective, cu_seqlens, token_sequence, normalizer)
    if advantages is None or objective.policy == "nll":
        advantages = None
    elif per_sequence and token_sequence is not None:
        advantages = advantages.index_select(0, token_sequence)
    elif per_sequence:
        advantages = advantages.unsqueeze(-1).expand(labels.shape)
    ratio_bounds = None
    if objective.ratio_level == "sequence":
        ratio_bounds = _flat_bounds(labels) if cu_seqlens is None else cu_seqlens.long()
    return TokenInputs(mask, weights, advantages, old_log_probs, ref_log_probs, ratio_bounds)


def _flat_bounds(labels: Tensor) -> Tensor:
    """`cu_seqlens` of the rows of padded labels, flattened."""
    sequences, length = labels.shape
    return torch.arange(sequences + 1, device=labels.device) * length


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`[T]` int64: which packed sequence a token belongs to."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    return ids.clamp(max=cu_seqlens.shape[0] - 2)


def loss_weights(
    mask: Tensor,
    objective: Objective,
    cu_seqlens: Tensor | None,
    token_sequence: Tensor | None,
    normalizer: float | Tensor | None,
) -> Tensor:
    """`w_t` with `loss = sum_t w_t loss_t`, fp32, shaped like the mask; no synchronisation."""
    m = mask.float()
    mode = objective.loss_agg_mode
    if mode == "token-mean":
        return m / (mask.sum().clamp(min=1) if normalizer is None else normalizer)
    if cu_seqlens is None:
        counts = mask.sum(-1)
    else:
        assert token_sequence is not None
        ends = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # integers: exact in any order
        bounds = ends.index_select(0, cu_seqlens.long())
        counts = bounds[1:] - bounds[:-1]
    if mode == "seq-mean-token-mean":
        per_sequence = 1.0 / counts.clamp(min=1)
        m = m * (
            per_sequence.unsqueeze(-1)
            if token_sequence is None
            else per_sequence.index_select(0, token_sequence)
        )
    elif mode == "seq-mean-token-sum-norm":
        m = m / float(objective.max_completion_length or 1)
    return m / ((counts > 0).sum().clamp(min=1) if normalizer is None else normalizer)


def _per_sequence_advantages(
    advantages: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, objective: Objective
) -> bool:
    """Checks the advantages; True when there is one for each sequence."""
    if advantages is None:
        if objective.policy != "nll":
            raise ValueError(f"advantages are needed by policy {objective.policy!r}, got None")
        return False
    check_device("advantages", advantages, labels)
    if not advantages.is_floating_point():
        raise TypeError(f"advantages must have a floating-point dtype, got {advantages.dtype}")
    if advantages.shape == labels.shape:
        return False
    if labels.dim() == 2:
        expected = f"{list(labels.shape)} or [{labels.shape[0]}]"
        fits = advantages.shape == labels.shape[:1]
    elif cu_seqlens is None:
        expected = f"{list(labels.shape)}, or [B] together with cu_seqlens"
        fits = False
    else:
        expected = f"{list(labels.shape)} or [{cu_seqlens.shape[0] - 1}]"
        fits = advantages.shape == (cu_seqlens.shape[0] - 1,)
    if not fits:
        raise ValueError(f"advantages must have shape {expected}, got {list(advantages.shape)}")
    return True


def _check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> None:
    if labels.dim() != 1:
        raise ValueError(f"cu_seqlens goes with packed labels [T], got labels {list(labels.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must have dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape [B + 1] with B >= 1, got {list(cu_seqlens.shape)}"
        )
    check_device("cu_seqlens", cu_seqlens, labels)
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return  # reading the values would break the graph or synchronise
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != labels.shape[0] or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {labels.shape[0]}, got {bounds[:8]}"
            f"{' ...' if len(bounds) > 8 else ''}"
        )
