"""The GRPO loss and its gradient in one sweep over the logits.

The gradient of a token-level objective is known as soon as its row's log-prob is,

    d loss / d logits[t, v] = w_t (d loss_t / d log_prob_t) (1[v = label_t] - p_tv) / temperature,

so forward computes it while the row is still in cache: one read and one write of the logits, where
eager PyTorch makes about ten passes over fp32 copies. `inplace=True` writes it over the logits and
needs no `[T, V]` memory at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import (
    IGNORE_INDEX,
    check_logits,
    choose_impl,
    device_guard,
    library,
)
from regrpo_kernels.grpo_rows import ROW_INPUTS, STATS, RowInputs, grpo_rows, total_loss
from regrpo_kernels.loss_inputs import prepare_tokens, sequence_ids
from regrpo_kernels.objective import (
    Objective,
    token_log_ratios,
    token_objective,
    with_gradient_of_log_prob,
)
from regrpo_kernels.token_log_probs import token_log_probs_reference


class LossOutput(NamedTuple):
    """What `grpo_loss` returns; everything but `loss` is detached.

    Attributes:
        loss: 0-d, differentiable with respect to the logits.
        log_probs, entropy: fp32, shaped like labels, zero where masked; entropy in nats.
        kl: like log_probs, or None without `ref_log_probs`.
        metrics: 0-d tensors, means over the unmasked tokens; reading them is what synchronises.
    """

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    metrics: dict[str, Tensor]


def grpo_loss_reference(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    ratio_bounds: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """The readable specification: `(loss, stats)`, by autograd, so the stats have no `dlog_prob`;
    fp64 works too.
    """
    rows = token_log_probs_reference(
        logits,
        labels.masked_fill(~mask, IGNORE_INDEX),
        temperature=objective.temperature,
        softcap=objective.softcap,
        return_entropy=True,
    )
    assert rows.entropy is not None
    # masked entries of the per-token inputs may hold anything as well
    old, ref, token_advantages = [
        None if x is None else x.to(rows.log_probs.dtype).masked_fill(~mask, 0.0)
        for x in (old_log_probs, ref_log_probs, advantages)
    ]
    log_ratios = token_log_ratios(rows.log_probs, old)
    if ratio_bounds is not None:
        mean = _sequence_means(log_ratios.detach(), mask, ratio_bounds)
        log_ratios = with_gradient_of_log_prob(mean, rows.log_probs)
    token = token_objective(rows.log_probs, log_ratios, ref, token_advantages, objective)
    loss = token.loss
    if objective.entropy_coef != 0:
        loss = loss - objective.entropy_coef * rows.entropy
    loss = loss.masked_fill(~mask, 0.0)
    stats = torch.stack(
        [
            x.detach().masked_fill(~mask, 0.0)
            for x in (
                loss,
                rows.log_probs,
                rows.lse,
                rows.entropy,
                token.kl,
                token.ratio,
                token.clip_low,
                token.clip_high,
            )
        ]
    )
    return (loss * weights).sum(), stats


def _sequence_means(values: Tensor, mask: Tensor, bounds: Tensor) -> Tensor:
    """Each token's mean over the unmasked tokens of its sequence, shaped like `values`."""
    kept = mask.flatten()
    ids = sequence_ids(bounds, kept.numel())
    totals, counts = (
        values.new_zeros(len(bounds) - 1).index_add(0, ids, x.flatten().to(values.dtype))
        for x in (values.masked_fill(~mask, 0.0), kept)
    )
    return (totals / counts.clamp(min=1)).index_select(0, ids).view(values.shape)


# --- the op ---------------------------------------------------------------------------------------

library.define(
    # consume: backward may overwrite dlogits, which the caller must then leave alone
    f"grpo_loss(Tensor logits, {ROW_INPUTS}, bool needs_gradient, bool consume, str impl) "
    "-> (Tensor loss, Tensor stats, Tensor dlogits)"
)
library.define(
    f"grpo_loss_(Tensor(a!) logits, {ROW_INPUTS}, str impl) -> (Tensor loss, Tensor stats)"
)
library.define("scale_gradient_(Tensor(a!) dlogits, Tensor scale, str impl) -> ()")


def _grpo_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, needs_gradient, _, impl = arguments
    dlogits = _gradient_buffer(logits, needs_gradient)
    rows = RowInputs(*inputs)
    stats = grpo_rows(logits, dlogits if needs_gradient else None, rows, impl)
    return total_loss(stats, rows.weights), stats, dlogits


def _grpo_loss_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl = arguments
    rows = RowInputs(*inputs)
    stats = grpo_rows(logits, logits, rows, impl)
    return total_loss(stats, rows.weights), stats


def _gradient_buffer(logits: Tensor, needs_gradient: bool) -> Tensor:
    shape = logits.shape if needs_gradient else (0,)
    return torch.empty(shape, dtype=logits.dtype, device=logits.device)


def _scale_gradient(dlogits: Tensor, scale: Tensor, impl: str) -> None:
    if impl == "triton":
        from regrpo_kernels import triton_grpo_loss

        with device_guard(dlogits):
            triton_grpo_loss.scale_gradient(dlogits, scale)
    elif dlogits.device.type == "cpu" and scale.item() == 1.0:
        return
    else:
        dlogits.mul_(scale)


for _device in ("CPU", "CUDA"):
    library.impl("grpo_loss", _grpo_loss, _device)
    library.impl("grpo_loss_", _grpo_loss_inplace, _device)
    library.impl("scale_gradient_", _scale_gradient, _device)


def _fake_outputs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    return loss, loss.new_empty((len(STATS), *labels.shape))


@torch.library.register_fake("regrpo_kernels::grpo_loss", lib=library)
def _(logits, labels, *arguments):
    return *_fake_outputs(logits, labels), _gradient_buffer(logits, arguments[-3])


@torch.library.register_fake("regrpo_kernels::grpo_loss_", lib=library)
def _(logits, labels, *arguments):
    return _fake_outputs(logits, labels)


@torch.library.register_fake("regrpo_kernels::scale_gradient_", lib=library)
def _(dlogits, scale, impl):
    return None


USED = (
    "{0}: its gradient was already used by an earlier backward; call "
    "backward(retain_graph=True) the first time, or {0} again"
)


def _setup_context(ctx, inputs, output):
    _, stats, ctx.dlogits = output
    *_, ctx.consume, ctx.impl = inputs
    ctx.mark_non_differentiable(stats, ctx.dlogits)
    # otherwise backward is handed zeros the size of the logits as the gradient of dlogits
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, dstats, ddlogits):
    dlogits = ctx.dlogits
    if dlogits is None:
        raise RuntimeError(USED.format("grpo_loss"))
    # given away, so that autograd can keep it as the .grad of a leaf without a copy
    if ctx.consume and may_give_away(dlogits):
        ctx.dlogits = None
    else:
        dlogits = dlogits.clone()
    torch.ops.regrpo_kernels.scale_gradient_(dlogits, dloss, ctx.impl)
    return dlogits, *[None] * 13


def may_give_away(gradient: Tensor) -> bool:
    """Not while the graph is kept for another backward, nor while a compiler traces."""
    return type(gradient) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


torch.library.register_autograd(
    "regrpo_kernels::grpo_loss", _backward, setup_context=_setup_context, lib=library
)


class _InplaceGrpoLoss(torch.autograd.Function):
    """For `grpo_loss_`: an op that mutates its input has no registered autograd."""

    @staticmethod
    def forward(ctx, logits, *arguments):
        loss, stats = torch.ops.regrpo_kernels.grpo_loss_(logits, *arguments)
        ctx.dlogits, ctx.impl = logits.detach(), arguments[-1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx, dloss, dstats):
        dlogits = ctx.dlogits
        if dlogits is None:
            raise RuntimeError(USED.format("grpo_loss"))
        ctx.dlogits = None
        torch.ops.regrpo_kernels.scale_gradient_(dlogits, dloss, ctx.impl)
        return dlogits, *[None] * 11


# --- the public function --------------------------------------------------------------------------


def grpo_loss(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor | None,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective | None = None,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> LossOutput:
    """The clipped policy-gradient loss over a batch of completions; forward holds its gradient.

    Args:
        logits: `[T, V]` (packed) or `[B, L, V]` (padded), fp32, bf16 or fp16; any strides with a
            contiguous last dimension. Row t scores `labels[t]`: shift the labels, not the logits.
        labels: int64 `[T]` or `[B, L]`; -100 masks the token.
        advantages: shaped like labels (per token) or `[B]` (per sequence); None for policy "nll".
        old_log_probs, ref_log_probs: shaped like labels; the behaviour policy's (None: the current
            ones, detached, so the ratio is 1) and the reference policy's (None: no KL).
        loss_mask: shaped like labels, nonzero where the token is trained. Masked rows of the logits
            are never read, and masked entries of the other inputs may hold anything.
        cu_seqlens: int32 or int64 `[B + 1]`, where packed sequences start and end; needed by
            per-sequence advantages, the "seq-mean-*" modes and sequence-level ratios over packed
            logits.
        objective: an `Objective`; None for its defaults.
        normalizer: replaces the number of trained tokens ("token-mean") or of sequences
            ("seq-mean-*") that the sum is divided by. Give the global count to split a batch into
            micro-batches or ranks.
        inplace: write the gradient over the logits, which then hold no logits any more. They may be
            the output of a layer, as long as its backward does not read that output (a linear head
            does not). Only takes effect where the logits require a gradient.
        impl: None (the best present), "reference", "cpu", "triton" or "cuda".

    Returns:
        `LossOutput`.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or option, before anything is written; a
            label or cu_seqlens out of range (on CPU, where checking costs no synchronisation).
    """
    objective = Objective() if objective is None else objective
    chosen = choose_impl(impl, logits.device)
    check_logits(logits, labels, reference=chosen == "reference")
    if inplace and chosen == "reference":
        raise ValueError("inplace=True is not available with impl='reference'")
    if inplace and any(
        s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError("logits must not be expanded (a stride of 0) when inplace=True")
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
        loss, stats = grpo_loss_reference(logits, labels, *tokens, objective)
    else:
        arguments = RowInputs.of(labels, tokens, objective)
        needs_gradient = logits.requires_grad and torch.is_grad_enabled()
        if inplace and needs_gradient:
            loss, stats = _InplaceGrpoLoss.apply(logits, *arguments, chosen)
        else:
            loss, stats, _ = torch.ops.regrpo_kernels.grpo_loss(
                logits, *arguments, needs_gradient, True, chosen
            )
    return loss_output(loss, stats, tokens.mask, ref_log_probs is not None)


def loss_output(loss: Tensor, stats: Tensor, mask: Tensor, has_ref: bool) -> LossOutput:
    share = mask.to(stats.dtype) / mask.sum().clamp(min=1)
    mean = dict(zip(STATS, stats.flatten(1).mv(share.flatten()).unbind(), strict=False))
    ratio = stats[STATS.index("ratio")]
    metrics = {
        "clip_ratio/low_mean": mean["clip_low"],
        "clip_ratio/high_mean": mean["clip_high"],
        "clip_ratio/region_mean": mean["clip_low"] + mean["clip_high"],
        "entropy": mean["entropy"],
        "ratio/mean": mean["ratio"],
    }
    if mask.numel() > 0:
        metrics["ratio/min"] = ratio.masked_fill(~mask, torch.inf).amin()
        metrics["ratio/max"] = ratio.amax()
    if has_ref:
        metrics["kl"] = mean["kl"]
    return LossOutput(
        loss,
        stats[STATS.index("log_prob")],
        stats[STATS.index("entropy")],
        stats[STATS.index("kl")] if has_ref else None,
        metrics,
    )
