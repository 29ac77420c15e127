"""`grpo_loss` from hidden states: the logits are never held whole.

Three matmuls a row (logits, d hidden, d weight) and no recomputation, because the gradient of a
token-level objective is known in the forward sweep; two where the head is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrpo_kernels._library import choose_impl, library
from regrpo_kernels.grpo_loss import (
    USED,
    LossOutput,
    grpo_loss_reference,
    loss_output,
    may_give_away,
)
from regrpo_kernels.grpo_rows import (
    ROW_INPUTS,
    STATS,
    RowInputs,
    empty_stats,
    grpo_rows,
    has_gradient,
    log_prob_rows,
    objective_gradient_rows,
    sequence_objective,
    total_loss,
)
from regrpo_kernels.linear_head import LinearHead, check_linear, fake_gradients, gradient_needs
from regrpo_kernels.loss_inputs import prepare_tokens
from regrpo_kernels.objective import Objective

library.define(
    f"linear_grpo_loss(Tensor hidden, Tensor weight, Tensor? bias, {ROW_INPUTS}, "
    "bool[] needs, bool consume, str impl) "
    "-> (Tensor loss, Tensor stats, Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def _linear_grpo_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *row_inputs, needs, _, impl = arguments
    inputs = RowInputs(*row_inputs)
    selected = inputs.mask.flatten().nonzero().squeeze(1)
    head = LinearHead(hidden, weight, bias, selected, needs)
    if inputs.ratio_bounds is None:
        found = _token_level(head, inputs.select(selected), any(needs), impl)
    else:
        found, head = _sequence_level(head, inputs.select(selected), needs, impl)
    stats = found.new_zeros(len(STATS), inputs.labels.numel())
    stats.index_copy_(1, selected, found[: len(STATS)])
    return (
        total_loss(stats, inputs.weights),
        stats.view(len(STATS), *inputs.labels.shape),
        *head.gradients(),
    )


def _token_level(head: LinearHead, inputs: RowInputs, gradient: bool, impl: str) -> Tensor:
    stats = torch.empty(len(STATS), len(inputs.labels), device=inputs.labels.device)
    for rows, logits in head.chunks():
        part = inputs.part(rows)
        stats[:, rows] = grpo_rows(logits, logits if gradient else None, part, impl)
        if gradient:
            head.add_gradient(rows, logits, has_gradient(part, stats[:, rows]))
    return stats


def _sequence_level(
    head: LinearHead, inputs: RowInputs, needs: list[bool], impl: str
) -> tuple[Tensor, LinearHead]:
    """All log-probs first. Rows that have a gradient are then multiplied again, unless all logits
    are still there.
    """
    stats = empty_stats(inputs)
    for rows, logits in head.chunks():
        log_prob_rows(logits, inputs.part(rows), stats[:, rows], impl)
    sequence_objective(inputs, stats, impl)
    if not any(needs):
        return stats, head
    kept = has_gradient(inputs, stats)
    if 0 < len(kept) <= head.chunk:
        objective_gradient_rows(logits, logits, inputs, stats, impl)
        head.add_gradient(rows, logits, kept)
        return stats, head
    index = kept.nonzero().squeeze(1)
    inputs, kept_stats = inputs.select(index), stats.index_select(1, index)
    head = head.narrowed(index)
    for rows, logits in head.chunks():
        part = inputs.part(rows)
        objective_gradient_rows(logits, logits, part, kept_stats[:, rows], impl)
        head.add_gradient(rows, logits)
    return stats, head


for _device in ("CPU", "CUDA"):
    library.impl("linear_grpo_loss", _linear_grpo_loss, _device)


@torch.library.register_fake("regrpo_kernels::linear_grpo_loss", lib=library)
def _(hidden, weight, bias, labels, *arguments):
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    stats = loss.new_empty((len(STATS), *labels.shape))
    return loss, stats, *fake_gradients(hidden, weight, bias, arguments[-3])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, stats, *ctx.gradients = output
    *_, ctx.needs, ctx.consume, ctx.impl = inputs
    ctx.mark_non_differentiable(stats, *ctx.gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    if ctx.gradients is None:
        raise RuntimeError(USED.format("linear_grpo_loss"))
    gradients = ctx.gradients
    # given away, so that autograd can keep them as the .grad of leaves without a copy
    if ctx.consume and all(map(may_give_away, gradients)):
        ctx.gradients = None
    else:
        gradients = [gradient.clone() for gradient in gradients]
    for gradient in gradients:
        rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient.unsqueeze(0)
        torch.ops.regrpo_kernels.scale_gradient_(rows, dloss, ctx.impl)
    kept = [g if need else None for g, need in zip(gradients, ctx.needs, strict=True)]
    return *kept, *[None] * 13


torch.library.register_autograd(
    "regrpo_kernels::linear_grpo_loss", _backward, setup_context=_setup_context, lib=library
)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor | None,
    *,
    bias: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective | None = None,
    normalizer: float | Tensor | None = None,
    impl: str | None = None,
) -> LossOutput:
    """`grpo_loss(hidden @ weight.T + bias, ...)` without the logits.

    Args:
        hidden: `[T, H]` (packed) or `[B, L, H]` (padded), fp32, bf16 or fp16.
        weight: `[V, H]`, the head, in hidden's dtype; gets a gradient if it requires one.
        bias: `[V]`, likewise.

    The other arguments and what is returned are those of `grpo_loss`; the loss is differentiable
    with respect to hidden, weight and bias. Rows that are not trained never reach the matmul and
    may hold anything. On a GPU, counting the trained rows synchronises.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or option, before anything is computed.
    """
    objective = Objective() if objective is None else objective
    chosen = choose_impl(impl, hidden.device)
    check_linear(hidden, weight, bias, labels, reference=chosen == "reference")
    tokens = prepare_tokens(
        labels,
        advantages,
        old_log_probs,
        ref_log_probs,
        loss_mask,
        cu_seqlens,
        objective,
        normalizer,
    )
    if chosen == "reference":
        logits = torch.nn.functional.linear(
            hidden.masked_fill(~tokens.mask.unsqueeze(-1), 0.0), weight, bias
        )
        loss, stats = grpo_loss_reference(logits, labels, *tokens, objective)
    else:
        loss, stats, *_ = torch.ops.regrpo_kernels.linear_grpo_loss(
            hidden,
            weight,
            bias,
            *RowInputs.of(labels, tokens, objective),
            gradient_needs(hidden, weight, bias),
            True,
            chosen,
        )
    return loss_output(loss, stats, tokens.mask, ref_log_probs is not None)
