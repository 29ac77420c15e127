"""Packed hidden states -> loss. Sees tensors only; only trained tokens reach the head."""

import torch
from torch.nn import functional as F

from regrpo.options.segment_ratios import segment_bounds
from regrpo.packing import PackedBatch
from regrpo_kernels import LossOutput, Objective, linear_grpo_loss, linear_token_log_probs


def policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch: PackedBatch,
    objective: Objective,
    normalizer: float | torch.Tensor | None,
    *,
    by_segment: bool = False,
) -> LossOutput:
    """The objective over the trained tokens of a packed batch.

    Args:
        hidden: of ``hidden_states``, [T, H] or [S, H], fp32, bf16 or fp16.
        weight: of the head, [V, H], in hidden's dtype.
        bias: of the head, [V], likewise; or None.
        normalizer: trained tokens (or sequences, by ``objective.loss_agg_mode``) of the whole
            update, so that the gradient does not depend on how it is split into packs; None for
            those of this batch.
        by_segment: the sequences that have one ratio each (``ratio_level="sequence"``) are the
            segments of ``regrpo.options.segment_ratios``.

    Returns:
        As `linear_grpo_loss`; its per-token values are those of the trained tokens, in order.

    Raises:
        ValueError, TypeError: as `linear_grpo_loss`.
    """
    rows = batch.loss_mask.nonzero().squeeze(1)
    if by_segment:
        cu_seqlens = segment_bounds(rows, batch.segment_ids)
    else:
        trained_before = F.pad(batch.loss_mask.cumsum(0), (1, 0))
        cu_seqlens = trained_before.index_select(0, batch.cu_seqlens.long()).to(torch.int32)
    select = [
        None if x is None else x.index_select(0, rows)
        for x in (batch.advantages, batch.old_log_probs, batch.ref_log_probs)
    ]
    return linear_grpo_loss(
        hidden.index_select(0, batch.computed(rows)),
        weight,
        batch.labels.index_select(0, rows),
        select[0],
        bias=bias,
        old_log_probs=select[1],
        ref_log_probs=select[2],
        cu_seqlens=cu_seqlens,
        objective=objective,
        normalizer=normalizer,
    )


@torch.no_grad()
def packed_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    batch: PackedBatch,
    temperature: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-probabilities of the trained tokens, float32 [T], 0 elsewhere; no gradient.

    Args:
        hidden, weight, bias: as in ``policy_loss``.
        temperature: logits are divided by it.
        softcap: of the logits before that (Gemma 2).
    """
    rows = batch.loss_mask.nonzero().squeeze(1)
    values = linear_token_log_probs(
        hidden.index_select(0, batch.computed(rows)),
        weight,
        batch.labels.index_select(0, rows),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
    ).log_probs
    return torch.zeros(len(batch.labels), device=hidden.device).index_copy(0, rows, values)
