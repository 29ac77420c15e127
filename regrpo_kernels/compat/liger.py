"""Liger's GRPO entry points (liger-kernel 0.8), on CPU as well.

Signatures, shapes, defaults and what is returned are Liger's. Values are too, except where Liger's
are not those of the objective: see `docs/compat.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from regrpo_kernels._library import IGNORE_INDEX, check_device
from regrpo_kernels.compat.inplace_log_probs import inplace_log_probs
from regrpo_kernels.compat.liger_linear import LigerFusedLinearGRPOLoss
from regrpo_kernels.compat.liger_shared import (
    check_combination,
    means,
    one_sweep_metrics,
    weighted,
)
from regrpo_kernels.compat.loss_types import (
    LossType,
    check_is_ratio,
    check_mask,
    check_shape,
    token_advantages,
)
from regrpo_kernels.grpo_loss import grpo_loss
from regrpo_kernels.token_log_probs import token_log_probs

__all__ = ["LigerFusedLinearGRPOLoss", "fused_selective_log_softmax", "triton_grpo_loss"]


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probs of the last L of `input_ids`, without a gradient.

    Args:
        logits: `[B, L + 1, V]`; the last row predicts what comes after the last token and is not
            read.
        input_ids: `[B, L]` or longer.
        temperature: logits are divided by it.
        mask: as `input_ids`; zero skips the token.

    Returns:
        fp32 `[B, L]`, zero where masked.

    Raises:
        ValueError, TypeError: as `token_log_probs`.
    """
    length = _completion_length(logits)
    ids = _last_tokens("input_ids", input_ids, logits.shape[0], length)
    kept = None if mask is None else _last_tokens("mask", mask, logits.shape[0], length)
    kept = check_mask("mask", kept, ids.shape, logits)
    labels = _labels(ids, kept)
    return token_log_probs(logits, labels, temperature=temperature).log_probs[:, :-1]


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """The GRPO loss from padded logits; see `LossType` for the loss types.

    Args:
        logits: `[B, L + 1, V]`, fp32, bf16 or fp16. After backward they hold their gradient if
            `inplace`; with `reduce`, token-level ratios and `inplace=False` they are read once
            instead of twice, at the cost of a gradient of their size.
        old_logp, ref_logp: `[B, L]`; None: a ratio of 1; no KL, which needs `beta=0`.
        completion_ids: `[B, L]`.
        advantages: `[B]`, or `[B, L]`.
        completion_mask: `[B, L]` of 0 and 1. Masked logits are never read.
        temperature: logits are divided by it.
        beta: weight of the KL against `ref_logp`.
        eps_low, eps_high: the ratio is clipped to `[1 - eps_low, 1 + eps_high]`; for "cispo",
            `eps_high` is the bound itself.
        inplace: write the gradient over the logits in backward.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo" or "vespo".
        max_completion_length: tokens; divides "dr_grpo", None for L.
        importance_sampling_level: of the ratio, "token" or "sequence".
        reduce: return the loss of the batch instead of the tokens'.
        sapo_temperature_pos, sapo_temperature_neg: of "sapo", for positive and other advantages.
        vllm_is_ratio: factors of the losses, `[B]`, `[B, 1]` or `[B, L]`, at least 0.
        delta: cap of the unclipped ratio; None for none.
        use_bias_correction_kl: the KL of a token times its ratio.
        num_items_in_batch: trained tokens of the whole batch, for "dapo", "cispo" and "vespo".
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of the weight of
            "vespo", for advantages from 0 up and below 0.

    Returns:
        `(loss [B, L], kl [B, L] or None, is_clipped [B, L])`, or with `reduce`
        `(loss, [kl, clip_ratio])`, 0-d, without the kl where `beta=0`.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or option, or two that exclude each other.
    """
    spec = LossType(
        loss_type=loss_type,
        beta=beta,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        importance_sampling_level=importance_sampling_level,
        use_bias_correction_kl=use_bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        temperature=temperature,
        max_completion_length=max_completion_length,
    )
    check_combination(spec)
    shape = torch.Size((logits.shape[0], _completion_length(logits)))
    check_shape("completion_ids", completion_ids, shape, logits)
    for name, tensor in (("old_logp", old_logp), ("ref_logp", ref_logp)):
        if tensor is not None:
            check_shape(name, tensor, shape, logits)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is needed by beta={beta}, got None")
    mask = check_mask("completion_mask", completion_mask, shape, logits)
    advantages = token_advantages(advantages, shape, logits)
    is_ratio = check_is_ratio("vllm_is_ratio", vllm_is_ratio, shape, logits)
    labels = _labels(completion_ids, mask)
    if reduce and not inplace and spec.one_sweep:
        found = grpo_loss(
            logits,
            labels,
            pad(weighted(advantages, is_ratio), (0, 1)),
            old_log_probs=None if old_logp is None else pad(old_logp, (0, 1)),
            ref_log_probs=pad(ref_logp, (0, 1)) if ref_logp is not None and beta != 0 else None,
            objective=spec.objective(),
            normalizer=spec.normalizer(mask, num_items_in_batch),
        )
        log_probs = found.log_probs[:, :-1]
        return found.loss, one_sweep_metrics(spec, found, log_probs, mask, advantages, old_logp)
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        log_probs = inplace_log_probs(logits, labels, temperature)
    else:
        log_probs = token_log_probs(logits, labels, temperature=temperature).log_probs
    loss, kl, clipped = spec.token_losses(
        log_probs[:, :-1], mask, advantages, old_logp, ref_logp, is_ratio
    )
    if not reduce:
        return loss, kl, clipped
    weights = spec.weights(mask, spec.normalizer(mask, num_items_in_batch))
    return (loss * weights).sum(), means(mask, kl, clipped)


def _completion_length(logits: Tensor) -> int:
    if logits.dim() != 3 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [B, L + 1, V], got {list(logits.shape)}")
    return logits.shape[1] - 1


def _last_tokens(name: str, tensor: Tensor, batch: int, length: int) -> Tensor:
    if tensor.dim() != 2 or tensor.shape[0] != batch or tensor.shape[1] < length:
        raise ValueError(
            f"{name} must have shape [{batch}, {length}] or be longer, got {list(tensor.shape)}"
        )
    return tensor[:, tensor.shape[1] - length :]


def _labels(ids: Tensor, mask: Tensor) -> Tensor:
    """`[B, L + 1]`: whole logits are taken as they are, and the last row is one more masked one."""
    check_device("completion_ids", ids, mask)
    return pad(ids.long().masked_fill(~mask, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)
