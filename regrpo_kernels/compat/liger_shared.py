"""What Liger's two losses share: what they refuse, and their metrics."""

from __future__ import annotations

from torch import Tensor

from regrpo_kernels.compat.loss_types import CLIP_TYPES, LossType
from regrpo_kernels.grpo_loss import LossOutput


def check_combination(spec: LossType) -> None:
    if spec.loss_type not in CLIP_TYPES:
        if spec.delta is not None:
            raise ValueError(f"delta is not supported for loss_type={spec.loss_type!r}")
        if spec.importance_sampling_level == "sequence":
            raise ValueError(
                "Sequence-level importance sampling is not supported for "
                f"loss_type={spec.loss_type!r}; pass importance_sampling_level='token'"
            )


def weighted(advantages: Tensor, is_ratio: Tensor | None) -> Tensor:
    """Every policy is linear in the size of the advantage."""
    return advantages if is_ratio is None else advantages * is_ratio


def one_sweep_metrics(
    spec: LossType,
    found: LossOutput,
    log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old: Tensor | None,
) -> list[Tensor]:
    """Of a loss in one sweep; not its own metrics, as the sampler's correction is in its
    advantages.
    """
    old = None if old is None else old.float().masked_fill(~mask, 0.0)
    clipped = spec.clipped(spec.log_ratios(log_probs, old, mask), advantages)
    kl = None if found.kl is None else found.kl[:, : mask.shape[1]]
    return means(mask, kl, clipped)


def means(mask: Tensor, kl: Tensor | None, clipped: Tensor) -> list[Tensor]:
    tokens = mask.sum().clamp(min=1)
    return [x.masked_fill(~mask, 0.0).sum() / tokens for x in (kl, clipped) if x is not None]
