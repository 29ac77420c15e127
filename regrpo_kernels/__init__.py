"""Fused kernels for RL on language models, over packed variable-length sequences."""

from regrpo_kernels._info import build_info
from regrpo_kernels._library import force_isa
from regrpo_kernels.group_advantages import group_advantages
from regrpo_kernels.grpo_loss import LossOutput, grpo_loss
from regrpo_kernels.linear_grpo_loss import linear_grpo_loss
from regrpo_kernels.linear_token_log_probs import linear_token_log_probs
from regrpo_kernels.objective import Objective
from regrpo_kernels.packing import Packs, best_fit_decreasing
from regrpo_kernels.reflection_advantages import (
    ReflectionAdvantages,
    Segment,
    reflection_advantages,
)
from regrpo_kernels.token_log_probs import TokenLogProbs, token_log_probs

__all__ = [
    "LossOutput",
    "Objective",
    "Packs",
    "ReflectionAdvantages",
    "Segment",
    "TokenLogProbs",
    "best_fit_decreasing",
    "build_info",
    "force_isa",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_token_log_probs",
    "reflection_advantages",
    "token_log_probs",
]
