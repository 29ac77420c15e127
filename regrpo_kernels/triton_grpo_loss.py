"""Triton kernels of `grpo_loss`; imported only where Triton is there."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from regrpo_kernels._library import rows
from regrpo_kernels.triton_objective import (
    objective_arguments,
    store_stats,
    token_objective,
    token_ratio,
)
from regrpo_kernels.triton_row import (
    launch_rows,
    row_arguments,
    row_kernel,
    row_values,
    write_gradient,
    write_zeros,
)


@row_kernel("POLICY", "HAS_OLD", "HAS_REF", "HAS_ENTROPY", "HAS_GRADIENT", "CAP")
def _grpo_loss_fwd_kernel(
    x_ptr,
    inner,
    x_stride_outer,
    x_stride_inner,
    d_ptr,
    d_stride_outer,
    d_stride_inner,
    labels_ptr,
    mask_ptr,
    weights_ptr,
    advantages_ptr,
    old_ptr,
    ref_ptr,
    stats_ptr,
    num_rows,
    vocab,
    inv_temperature,
    softcap,
    epsilon_low,
    epsilon_high,
    delta,
    beta,
    entropy_coef,
    sapo_tau_pos,
    sapo_tau_neg,
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    CAP: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d_row = d_ptr + (row // inner) * d_stride_outer + (row % inner) * d_stride_inner
    if tl.load(mask_ptr + row) == 0:
        for i in tl.static_range(9):
            tl.store(stats_ptr + i * num_rows + row, 0.0)
        if HAS_GRADIENT:
            write_zeros(d_row, vocab, BLOCK_V)
    else:
        label = tl.load(labels_ptr + row)
        x_row = x_ptr + (row // inner) * x_stride_outer + (row % inner) * x_stride_inner
        maximum, total, log_prob, lse, entropy = row_values(
            x_row, label, vocab, inv_temperature, softcap, CAP, BLOCK_V
        )
        advantage = 1.0
        if HAS_ADVANTAGES:
            advantage = tl.load(advantages_ptr + row)
        old = 0.0
        if HAS_OLD:
            old = tl.load(old_ptr + row)
        ref = 0.0
        if HAS_REF:
            ref = tl.load(ref_ptr + row)
        ratio, dratio = token_ratio(log_prob, old, HAS_OLD)
        loss, dlog_prob, kl, clip_low, clip_high = token_objective(
            log_prob,
            ratio,
            dratio,
            ref,
            advantage,
            epsilon_low,
            epsilon_high,
            delta,
            beta,
            sapo_tau_pos,
            sapo_tau_neg,
            POLICY,
            KL,
            HAS_REF,
            HAS_DELTA,
        )
        if HAS_ENTROPY:
            loss -= entropy_coef * entropy
        weight = tl.load(weights_ptr + row)
        dlog_prob *= weight
        store_stats(stats_ptr, row, True, num_rows, loss, kl, ratio, clip_low, clip_high, dlog_prob)
        tl.store(stats_ptr + num_rows + row, log_prob)
        tl.store(stats_ptr + 2 * num_rows + row, lse)
        tl.store(stats_ptr + 3 * num_rows + row, entropy)
        if HAS_GRADIENT:
            g = dlog_prob * inv_temperature
            k = 0.0
            if HAS_ENTROPY:
                k = weight * inv_temperature * entropy_coef
            if (g == 0.0) & (k == 0.0):
                write_zeros(d_row, vocab, BLOCK_V)
            else:
                write_gradient(
                    x_row,
                    d_row,
                    label,
                    vocab,
                    inv_temperature,
                    softcap,
                    maximum,
                    total,
                    entropy,
                    g,
                    k,
                    CAP,
                    HAS_ENTROPY,
                    BLOCK_V,
                )


@triton.jit(do_not_specialize=["inner", "d_stride_outer"])
def _scale_gradient_kernel(
    d_ptr, inner, d_stride_outer, d_stride_inner, scale_ptr, vocab, BLOCK_V: tl.constexpr
):
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        row = tl.program_id(0).to(tl.int64)
        d_row = d_ptr + (row // inner) * d_stride_outer + (row % inner) * d_stride_inner
        for start in range(0, vocab, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            d = tl.load(d_row + cols, mask=cols < vocab).to(tl.float32) * scale
            tl.store(d_row + cols, d.to(d_ptr.dtype.element_ty), mask=cols < vocab)


def grpo_loss(
    logits: Tensor,
    dlogits: Tensor | None,
    labels: Tensor,
    stats: Tensor,
    *token_arguments: Any,
) -> None:
    """One sweep over the rows. `token_arguments` are those of `objective_arguments`."""
    if labels.numel() == 0:
        return
    arguments, flags = objective_arguments(*token_arguments)
    options = token_arguments[-1]
    arguments |= row_arguments(logits, logits if dlogits is None else dlogits)
    arguments |= {
        "labels_ptr": labels,
        "stats_ptr": stats,
        "num_rows": labels.numel(),
        "inv_temperature": 1.0 / options["temperature"],
        "softcap": options["softcap"],
    }
    launch_rows(
        _grpo_loss_fwd_kernel,
        labels.numel(),
        arguments,
        **flags,
        HAS_GRADIENT=dlogits is not None,
        CAP=options["softcap"] > 0,
    )


def scale_gradient(dlogits: Tensor, scale: Tensor) -> None:
    """`dlogits *= scale`, decided on the device: a scale of 1 costs neither a pass nor a sync."""
    if dlogits.numel() == 0:
        return
    vocab = dlogits.shape[-1]
    _scale_gradient_kernel[(dlogits.numel() // vocab,)](
        dlogits, *rows(dlogits)[1:], scale, vocab, BLOCK_V=4096, num_warps=8
    )
