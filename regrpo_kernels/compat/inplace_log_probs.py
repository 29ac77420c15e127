"""Log-probs whose backward writes the gradient over the logits.

`grpo_loss(inplace=True)` does so in forward already. Code written for Liger may read its logits
until backward, so the functions that stand in for Liger's wait as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrpo_kernels._library import check_logits, choose_impl
from regrpo_kernels.token_log_probs import check_scaling, gradient_rows


class _InplaceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float, impl: str) -> Tensor:
        log_probs, _, _, row_sums = torch.ops.regrpo_kernels.token_log_probs(
            logits, labels, temperature, 0.0, False, impl
        )
        ctx.save_for_backward(logits, labels, row_sums)
        ctx.temperature, ctx.impl, ctx.used = temperature, impl, False
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlog_probs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError(
                "inplace=True: an earlier backward wrote its gradient over the logits; pass "
                "inplace=False to go backward twice"
            )
        ctx.used = True
        logits, labels, row_sums = ctx.saved_tensors
        dlogits = logits.detach()
        gradient_rows(
            dlogits,
            labels,
            row_sums,
            row_sums,  # no entropy, so it is not read
            dlog_probs,
            None,
            dlogits,
            ctx.temperature,
            0.0,
            ctx.impl,
        )
        # whoever saved these logits for a backward of its own gets an error, not a wrong gradient
        torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None


def inplace_log_probs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`token_log_probs(...).log_probs`, fp32; after backward the logits hold their gradient."""
    impl = choose_impl(None, logits.device)
    check_logits(logits, labels)
    check_scaling(temperature, None)
    if any(s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("logits must not be expanded (a stride of 0) when inplace=True")
    return _InplaceLogProbs.apply(logits, labels, temperature, impl)
