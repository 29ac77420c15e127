"""The per-token objective: `(log_prob, old, ref, advantage) -> loss`, and its options.

The formulas live in three places that must agree: `token_objective` here (the readable
specification), `csrc/objective.h` (C++ and CUDA) and `token_objective` in `triton_objective.py`.

Sources: GRPO (arXiv 2402.03300, eq. 3-4), DAPO (arXiv 2503.14476: the two clip bounds and the token
    mean),
Dr. GRPO (arXiv 2503.20783: a constant length), CISPO (arXiv 2506.13585), SAPO (arXiv 2511.20347),
GSPO (arXiv 2507.18071), the two-sided clip `delta` (arXiv 2505.07291) and the KL estimators k1, k2,
k3 (J. Schulman, "Approximating KL divergence", 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

POLICIES = ("clip", "cispo", "sapo", "reinforce", "nll")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
LOSS_AGG_MODES = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)

# exp(20) is large enough to clip and small enough that its products stay finite.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Objective:
    """What is optimised; `token_objective` is the formula.

    Attributes:
        policy: "clip", "cispo", "sapo", "reinforce" or "nll" (advantages ignored).
        ratio_level: "token", or "sequence" (GSPO: the geometric mean of a sequence's token ratios).
        epsilon_low, epsilon_high: the ratio is clipped to `[1 - epsilon_low, 1 + epsilon_high]`.
        delta: cap of the unclipped ratio in "clip" (two-sided clip); None for no cap.
        beta: weight of the KL penalty against `ref_log_probs`.
        kl_estimator: "k1" (value of k1, gradient of k2), "k2" or "k3".
        temperature: logits are divided by it.
        softcap: logits become `softcap * tanh(logits / softcap)` before the temperature; None for
            none.
        entropy_coef: weight of the entropy bonus.
        loss_agg_mode: one of `LOSS_AGG_MODES`.
        max_completion_length: tokens; the constant of "seq-mean-token-sum-norm".
        sapo_tau_pos, sapo_tau_neg: temperatures of "sapo" for positive and for other advantages.
    """

    policy: str = "clip"
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    temperature: float = 1.0
    softcap: float | None = None
    entropy_coef: float = 0.0
    loss_agg_mode: str = "token-mean"
    max_completion_length: int | None = None
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name, allowed in (
            ("policy", POLICIES),
            ("ratio_level", RATIO_LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
            ("loss_agg_mode", LOSS_AGG_MODES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"Objective.{name} must be one of {allowed}, got {value!r}")
        for name in ("temperature", "sapo_tau_pos", "sapo_tau_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"Objective.{name} must be greater than 0, got {getattr(self, name)!r}"
                )
        for name in ("softcap", "delta", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Objective.{name} must be None or greater than 0, got {value!r}")
        for name in ("epsilon_low", "epsilon_high", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"Objective.{name} must be 0 or greater, got {getattr(self, name)!r}"
                )
        if self.loss_agg_mode == "seq-mean-token-sum-norm" and self.max_completion_length is None:
            raise ValueError(
                "Objective.max_completion_length is needed by loss_agg_mode "
                "'seq-mean-token-sum-norm', got None"
            )


class TokenObjective(NamedTuple):
    """Per-token values, shaped like the log-probs."""

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    clip_low: Tensor
    clip_high: Tensor


def token_log_ratios(log_probs: Tensor, old_log_probs: Tensor | None) -> Tensor:
    """`log_prob - old`, clamped to +-20 with zero gradient outside."""
    forbidden = log_probs == -torch.inf
    if old_log_probs is None:
        return with_gradient_of_log_prob(torch.zeros_like(log_probs), log_probs)
    d = (log_probs - old_log_probs).masked_fill(forbidden, -torch.inf)
    return d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def with_gradient_of_log_prob(value: Tensor, log_probs: Tensor) -> Tensor:
    """`sg(value) + log_prob - sg(log_prob)`."""
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return value.detach() + (finite - finite.detach())


def token_kl(log_probs: Tensor, ref_log_probs: Tensor, kl_estimator: str) -> Tensor:
    """The KL estimate of each token, differentiable in `log_probs`; `ref_log_prob - log_prob` is
    clamped to +-20 with zero gradient outside.
    """
    x = ref_log_probs - log_probs
    x = x.masked_fill((log_probs == -torch.inf) & (ref_log_probs == -torch.inf), 0.0)
    x = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kl_estimator == "k3":
        return torch.expm1(x) - x
    kl = 0.5 * x.square()
    return kl if kl_estimator == "k2" else kl + (-x - kl).detach()


def token_objective(
    log_probs: Tensor,
    log_ratios: Tensor,
    ref_log_probs: Tensor | None,
    advantages: Tensor | None,
    objective: Objective,
) -> TokenObjective:
    """The loss of each token, differentiable in `log_probs`, without the entropy bonus.

    A label whose logit is -inf has log-prob -inf: its ratio is 0 and nothing is pushed through it.
    """
    o = objective
    low, high = 1.0 - o.epsilon_low, 1.0 + o.epsilon_high
    forbidden = log_probs == -torch.inf
    d = log_ratios
    ratio = d.exp().masked_fill(forbidden, 0.0)
    a = torch.ones_like(log_probs) if o.policy == "nll" or advantages is None else advantages
    clipped = ratio.clamp(low, high)

    if o.policy == "clip":
        capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        free_term, clipped_term = capped * a, clipped * a
        # on a tie the unclipped term carries the whole gradient
        loss = -torch.where(free_term <= clipped_term, free_term, clipped_term)
    elif o.policy == "cispo":
        weight = clipped.detach() * a
        loss = -(weight * log_probs).masked_fill(weight == 0, 0.0)
    elif o.policy == "sapo":
        tau = torch.where(a > 0, o.sapo_tau_pos, o.sapo_tau_neg)
        x = tau * (ratio - 1.0)
        # sigmoid(x), of which autograd's slope s (1 - s) does not cancel
        s = torch.where(x > 0, 1.0 - torch.sigmoid(-x), torch.sigmoid(x))
        loss = -(4.0 / tau) * s * a
    else:
        loss = -(a * log_probs).masked_fill(a == 0, 0.0)

    kl = torch.zeros_like(log_probs)
    if ref_log_probs is not None:
        kl = token_kl(log_probs, ref_log_probs, o.kl_estimator)
        if o.beta != 0:
            loss = loss + o.beta * kl
    return TokenObjective(
        loss,
        kl.detach(),
        ratio.detach(),
        ((ratio < low) & (a < 0)).to(log_probs.dtype),
        ((ratio > high) & (a > 0)).to(log_probs.dtype),
    )
