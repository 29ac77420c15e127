"""A language-model head with the scalings of TRL's: `c tanh(s (h W + b) / c) / temperature`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regrpo_kernels.grpo_loss import LossOutput
from regrpo_kernels.linear_grpo_loss import linear_grpo_loss
from regrpo_kernels.linear_token_log_probs import linear_token_log_probs
from regrpo_kernels.objective import Objective
from regrpo_kernels.token_log_probs import TokenLogProbs


@dataclass(frozen=True)
class ScaledHead:
    """Attributes:
    temperature: logits are divided by it.
    softcap: c; None for none.
    logit_scale: s, greater than 0.
    fp32: the matmul is in fp32, also under autocast.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    fp32: bool = False

    def __post_init__(self) -> None:
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale must be greater than 0, got {self.logit_scale!r}")

    def log_probs(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, entropy: bool
    ) -> TokenLogProbs:
        hidden, weight, bias = self._in_one_dtype(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_token_log_probs(
                hidden, weight, labels, bias=bias, return_entropy=entropy, **self._scaling()
            )

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        advantages: Tensor,
        objective: Objective,
        **inputs: Any,
    ) -> LossOutput:
        """`linear_grpo_loss`; the scalings here replace those of the objective."""
        hidden, weight, bias = self._in_one_dtype(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_grpo_loss(
                hidden,
                weight,
                labels,
                advantages,
                bias=bias,
                objective=replace(objective, **self._scaling()),
                **inputs,
            )

    def _scaling(self) -> dict[str, Any]:
        # c tanh(s y / c) / t = (c / s) tanh(y / (c / s)) / (t / s)
        softcap = None if self.softcap is None else self.softcap / self.logit_scale
        return {"temperature": self.temperature / self.logit_scale, "softcap": softcap}

    def _in_one_dtype(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        device = hidden.device.type
        if self.fp32:
            dtype = torch.float32
        elif torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = hidden.dtype
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def logit_scale_of(config: Any) -> float:
    """The factor of the logits; families of models name it differently in their configuration."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling
