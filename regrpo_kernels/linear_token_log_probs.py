"""`token_log_probs` from hidden states: the logits are never held whole, forward or backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrpo_kernels._library import IGNORE_INDEX, choose_impl, library
from regrpo_kernels.linear_head import LinearHead, check_linear, fake_gradients
from regrpo_kernels.token_log_probs import (
    TokenLogProbs,
    check_scaling,
    empty_outputs,
    forward_rows,
    gradient_rows,
    token_log_probs_reference,
)

library.define(
    "linear_token_log_probs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "float temperature, float softcap, bool return_entropy, str impl) "
    "-> (Tensor log_probs, Tensor lse, Tensor entropy, Tensor row_sums)"
)
library.define(
    "linear_token_log_probs_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor row_sums, Tensor entropy, Tensor dlog_probs, Tensor? dentropy, float temperature, "
    "float softcap, bool[] needs, str impl) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    softcap: float,
    return_entropy: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    selected = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    head = LinearHead(hidden, weight, bias, selected, [False] * 3)
    kept = labels.flatten().index_select(0, selected)
    found = torch.zeros(5, len(selected), dtype=torch.float32, device=hidden.device)
    for rows, logits in head.chunks():
        log_probs, lse, entropy = found[:3, rows]
        wanted = entropy if return_entropy else None
        row_sums = found[3:, rows]
        forward_rows(
            logits, kept[rows], log_probs, lse, wanted, row_sums, temperature, softcap, impl
        )
    whole = found.new_zeros(5, labels.numel()).index_copy_(1, selected, found)
    whole = whole.view(5, *labels.shape)
    log_probs, lse, entropy = (x.clone() for x in whole[:3])
    entropy = entropy if return_entropy else entropy.new_empty(0)
    return log_probs, lse, entropy, whole[3:].clone()


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_sums: Tensor,
    entropy: Tensor,
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    temperature: float,
    softcap: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pushed = dlog_probs != 0 if dentropy is None else (dlog_probs != 0) | (dentropy != 0)
    selected = ((labels != IGNORE_INDEX) & pushed).flatten().nonzero().squeeze(1)
    head = LinearHead(hidden, weight, bias, selected, needs)
    row_labels, row_dlog_probs = (
        x.flatten().index_select(0, selected) for x in (labels, dlog_probs)
    )
    row_sums = row_sums.flatten(1).index_select(1, selected)
    # Without entropy, neither it nor its gradient is read.
    row_entropy, row_dentropy = entropy, dentropy
    if dentropy is not None:
        row_entropy, row_dentropy = (
            x.flatten().index_select(0, selected) for x in (entropy, dentropy)
        )
    for rows, logits in head.chunks():
        gradient_rows(
            logits,
            row_labels[rows],
            row_sums[:, rows],
            row_entropy[rows],
            row_dlog_probs[rows],
            None if row_dentropy is None else row_dentropy[rows],
            logits,
            temperature,
            softcap,
            impl,
        )
        head.add_gradient(rows, logits)
    return head.gradients()


for _device in ("CPU", "CUDA"):
    library.impl("linear_token_log_probs", _forward, _device)
    library.impl("linear_token_log_probs_backward", _backward, _device)


@torch.library.register_fake("regrpo_kernels::linear_token_log_probs", lib=library)
def _(hidden, weight, bias, labels, temperature, softcap, return_entropy, impl):
    return empty_outputs(labels, return_entropy)


@torch.library.register_fake("regrpo_kernels::linear_token_log_probs_backward", lib=library)
def _(hidden, weight, bias, labels, row_sums, entropy, dlog_probs, dentropy, t, c, needs, impl):
    return fake_gradients(hidden, weight, bias, needs)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.temperature, ctx.softcap, ctx.return_entropy, ctx.impl = inputs
    _, lse, entropy, row_sums = output
    ctx.save_for_backward(*tensors, row_sums, entropy)
    ctx.mark_non_differentiable(lse, row_sums)


def _autograd_backward(
    ctx: Any, dlog_probs: Tensor, dlse: Tensor, dentropy: Tensor, drow_sums: Tensor
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.regrpo_kernels.linear_token_log_probs_backward(
        *ctx.saved_tensors,
        dlog_probs,
        dentropy if ctx.return_entropy else None,
        ctx.temperature,
        ctx.softcap,
        needs,
        ctx.impl,
    )
    kept = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return *kept, *[None] * 5


torch.library.register_autograd(
    "regrpo_kernels::linear_token_log_probs",
    _autograd_backward,
    setup_context=_setup_context,
    lib=library,
)


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str | None = None,
) -> TokenLogProbs:
    """`token_log_probs(hidden @ weight.T + bias, labels)` without the logits.

    Args:
        hidden: `[T, H]` (packed) or `[B, L, H]` (padded), fp32, bf16 or fp16.
        weight: `[V, H]`, the head, in hidden's dtype; gets a gradient if it requires one.
        bias: `[V]`, likewise.

    The other arguments and what is returned are those of `token_log_probs`. Backward computes the
    logits again, chunk by chunk. Skipped rows never reach the matmul and may hold anything. On a
    GPU, counting the others synchronises.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or option, before anything is computed.
    """
    chosen = choose_impl(impl, hidden.device)
    check_linear(hidden, weight, bias, labels, reference=chosen == "reference")
    check_scaling(temperature, softcap)
    if chosen == "reference":
        kept = (labels != IGNORE_INDEX).unsqueeze(-1)
        logits = torch.nn.functional.linear(hidden.masked_fill(~kept, 0.0), weight, bias)
        return token_log_probs_reference(
            logits, labels, temperature=temperature, softcap=softcap, return_entropy=return_entropy
        )
    log_probs, lse, entropy, _ = torch.ops.regrpo_kernels.linear_token_log_probs(
        hidden, weight, bias, labels, temperature, softcap or 0.0, return_entropy, chosen
    )
    return TokenLogProbs(log_probs, lse, entropy if return_entropy else None)
