"""What TRL and Liger call a loss type: a loss for each token, and how the sum is divided.

| loss_type | loss of a token | divided by |
|---|---|---|
| grpo | clip | each sequence's tokens, then B |
| bnpo | clip | the tokens |
| dr_grpo | clip | B * max_completion_length |
| dapo | clip | the tokens of the whole batch, over the number of processes |
| luspo | clip | B (arXiv 2602.05261: a sequence counts by its length) |
| cispo | cispo, only bounded from above, by `epsilon_high` itself | as dapo |
| sapo | sapo | as grpo |
| vespo | -phi A log_prob, phi detached (arXiv 2602.10693) | as dapo |

All eight go through `Objective`: "clip", "cispo" and "sapo" are its policies, and a detached
coefficient times the advantage under "reinforce" is the rest. `one_sweep` says which of them
`grpo_loss` computes without knowing the log-probs first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import check_device
from regrpo_kernels.loss_inputs import loss_weights
from regrpo_kernels.objective import (
    MAX_LOG_RATIO,
    RATIO_LEVELS,
    Objective,
    token_kl,
    token_log_ratios,
    token_objective,
)

CLIP_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIP_TYPES, "cispo", "sapo", "vespo")
_BATCH_MEAN = ("dapo", "cispo", "vespo")  # divided by the tokens of the whole batch
# w of VESPO below this counts as this
_LOG_MIN_WEIGHT = math.log(1e-8)


@dataclass(frozen=True)
class LossType:
    """The options that TRL and Liger share, under their names."""

    loss_type: str
    beta: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    temperature: float = 1.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {self.loss_type!r}")
        if self.importance_sampling_level not in RATIO_LEVELS:
            raise ValueError(
                f"importance_sampling_level must be one of {RATIO_LEVELS}, "
                f"got {self.importance_sampling_level!r}"
            )
        for name in ("temperature", "sapo_temperature_pos", "sapo_temperature_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)!r}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta must be None or greater than 0, got {self.delta!r}")

    @property
    def one_sweep(self) -> bool:
        """Whether the gradient of a token is known as soon as its own log-prob is, by an
        `Objective`.
        """
        return (
            self.importance_sampling_level == "token"
            and not (self.use_bias_correction_kl and self.beta != 0)
            and (
                self.loss_type in (*CLIP_TYPES, "sapo")
                # Objective's bound is 1 + epsilon_high with epsilon_high at least 0
                or (self.loss_type == "cispo" and self.epsilon_high >= 1)
            )
        )

    def objective(self) -> Objective:
        """What `grpo_loss` computes where `one_sweep`."""
        return self._objective(
            "cispo" if self.loss_type == "cispo" else self._policy(),
            beta=self.beta,
            loss_agg_mode=self._aggregation(),
        )

    def token_losses(
        self,
        log_probs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        old_log_probs: Tensor | None,
        ref_log_probs: Tensor | None,
        is_ratio: Tensor | None,
    ) -> TokenLosses:
        """The loss of each token, differentiable in `log_probs`; every argument is `[B, L]`. Masked
        entries of `log_probs` are 0, those of the others may hold anything.

        `is_ratio`, `[B, L]` or `[B, 1]`, corrects for a sampler that is not quite the old policy: a
        factor of the policy's loss, before the KL.
        """
        dtype = log_probs.dtype
        advantages = advantages.to(dtype).masked_fill(~mask, 0.0)
        old, ref = (
            None if x is None else x.to(dtype).masked_fill(~mask, 0.0)
            for x in (old_log_probs, ref_log_probs)
        )
        if is_ratio is not None:
            is_ratio = is_ratio.to(dtype)
            if is_ratio.shape == mask.shape:
                is_ratio = is_ratio.masked_fill(~mask, 1.0)
        log_ratios = self.log_ratios(log_probs, old, mask)
        weighted = advantages
        if self.loss_type == "cispo":
            weighted = advantages * log_ratios.detach().exp().clamp(max=self.epsilon_high)
        elif self.loss_type == "vespo":
            weighted = advantages * self._gamma_weights(log_probs, old, mask, advantages, is_ratio)
            is_ratio = None
        token = token_objective(
            log_probs, log_ratios, None, weighted, self._objective(self._policy())
        )
        loss = token.loss if is_ratio is None else token.loss * is_ratio
        kl = None
        if self.beta != 0:
            assert ref is not None
            kl = token_kl(log_probs, ref, "k3")
            if self.use_bias_correction_kl:
                kl = kl * log_ratios.exp()
            loss = loss + self.beta * kl
            kl = kl.detach().masked_fill(~mask, 0.0)
        clipped = self.clipped(log_ratios.detach(), advantages).masked_fill(~mask, 0.0)
        return TokenLosses(loss.masked_fill(~mask, 0.0), kl, clipped)

    def log_ratios(self, log_probs: Tensor, old: Tensor | None, mask: Tensor) -> Tensor:
        """Of each token, or of its sequence: the mean over its unmasked tokens, through which the
        gradient flows to all of them.
        """
        if self.importance_sampling_level == "token":
            return token_log_ratios(log_probs, old)
        raw = token_log_ratios(log_probs, None) if old is None else log_probs - old
        total = raw.masked_fill(~mask, 0.0).sum(-1, keepdim=True)
        mean = total / mask.sum(-1, keepdim=True).clamp(min=1)
        return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(log_probs)

    def clipped(self, log_ratios: Tensor, advantages: Tensor) -> Tensor:
        """1.0 where the ratio is outside its bounds on the side that the advantage pushes to."""
        ratio = log_ratios.exp()
        if self.loss_type in CLIP_TYPES:
            low, high = ratio < 1 - self.epsilon_low, ratio > 1 + self.epsilon_high
            return ((low & (advantages < 0)) | (high & (advantages > 0))).to(ratio.dtype)
        if self.loss_type == "cispo":
            return ((ratio > self.epsilon_high) & (advantages > 0)).to(ratio.dtype)
        return torch.zeros_like(ratio)

    def weights(self, mask: Tensor, normalizer: Tensor | float) -> Tensor:
        """`w` with `loss = sum(w * token losses)`."""
        return loss_weights(
            mask,
            self._objective(self._policy(), loss_agg_mode=self._aggregation()),
            None,
            None,
            normalizer,
        )

    def normalizer(self, mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor | float:
        """What the sum is divided by, beside each sequence's length for "grpo" and "sapo".

        `num_items_in_batch`: the trained tokens of all micro-batches and processes; without it
        those of this micro-batch on all processes.
        """
        batch, length = mask.shape
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            return float(batch * (self.max_completion_length or length))
        if self.loss_type not in _BATCH_MEAN:
            return float(max(batch, 1))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if num_items_in_batch is None:
            total = mask.sum().float()
            if distributed:
                torch.distributed.all_reduce(total)
        else:
            total = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
        return (total / processes).clamp(min=1)

    def _policy(self) -> str:
        if self.loss_type in CLIP_TYPES:
            return "clip"
        return "sapo" if self.loss_type == "sapo" else "reinforce"

    def _aggregation(self) -> str:
        if self.loss_type in ("grpo", "sapo"):
            return "seq-mean-token-mean"
        return "seq-mean-token-sum" if self.loss_type == "luspo" else "token-mean"

    def _objective(
        self, policy: str, beta: float = 0.0, loss_agg_mode: str = "token-mean"
    ) -> Objective:
        low, high = self.epsilon_low, self.epsilon_high
        if policy == "cispo":
            low, high = 1.0, self.epsilon_high - 1.0
        elif policy != "clip":
            low, high = 0.2, 0.2  # unused
        return Objective(
            policy=policy,
            epsilon_low=low,
            epsilon_high=high,
            delta=self.delta,
            beta=beta,
            temperature=self.temperature,
            loss_agg_mode=loss_agg_mode,
            sapo_tau_pos=self.sapo_temperature_pos,
            sapo_tau_neg=self.sapo_temperature_neg,
        )

    @torch.no_grad()
    def _gamma_weights(
        self,
        log_probs: Tensor,
        old: Tensor | None,
        mask: Tensor,
        advantages: Tensor,
        is_ratio: Tensor | None,
    ) -> Tensor:
        """VESPO's `phi(w) = e^l w^k e^(-l w)`; w is the product of the sequence's ratios."""
        log_w = token_log_ratios(log_probs, old).masked_fill(~mask, 0.0).sum(-1, keepdim=True)
        if is_ratio is not None:
            log_is = is_ratio.log().clamp(_LOG_MIN_WEIGHT, MAX_LOG_RATIO)
            log_w = log_w + log_is.sum(-1, keepdim=True)
        log_w = log_w.clamp(_LOG_MIN_WEIGHT, MAX_LOG_RATIO)
        k = torch.where(advantages >= 0, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(advantages >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg)
        rate = rate.clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp()


class TokenLosses(NamedTuple):
    """`[B, L]`, zero where masked; `kl` and `clipped` are detached, `kl` None where beta is 0."""

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


# --- argument checks, shared by the modules -------------------------------------------------------


def check_mask(name: str, mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """The mask as bool; all of the tokens for None."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    check_shape(name, mask, shape, like)
    kept = mask != 0
    # a weight would be lost; on a GPU looking would synchronise
    if mask.is_floating_point() and mask.device.type == "cpu" and bool((kept & (mask != 1)).any()):
        raise ValueError(f"{name} must hold 0 and 1, got other values")
    return kept


def check_shape(name: str, tensor: Tensor, shape: torch.Size, like: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, like)


def check_is_ratio(
    name: str, ratio: Tensor | None, shape: torch.Size, like: Tensor
) -> Tensor | None:
    """`[B]`, `[B, 1]` or `[B, L]` -> `[B, 1]` or `[B, L]`."""
    if ratio is None:
        return None
    allowed = (list(shape[:1]), [shape[0], 1], list(shape))
    if list(ratio.shape) not in allowed:
        raise ValueError(f"{name} must have a shape of {allowed}, got {list(ratio.shape)}")
    check_device(name, ratio, like)
    return ratio.unsqueeze(-1) if ratio.dim() == 1 else ratio


def token_advantages(advantages: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """`[B]` or `[B, L]` -> `[B, L]`."""
    if advantages.shape not in (shape, shape[:1]):
        raise ValueError(
            f"advantages must have shape {list(shape[:1])} or {list(shape)}, "
            f"got {list(advantages.shape)}"
        )
    check_device("advantages", advantages, like)
    return advantages if advantages.dim() == 2 else advantages.unsqueeze(-1).expand(shape)
