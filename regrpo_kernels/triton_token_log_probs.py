"""Triton kernels of `token_log_probs`; imported only where Triton is there."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from regrpo_kernels.triton_row import (
    IGNORE_INDEX,
    launch_rows,
    row_arguments,
    row_kernel,
    row_values,
    write_gradient,
    write_zeros,
)


@row_kernel("HAS_ENTROPY", "CAP")
def _token_log_probs_fwd_kernel(
    x_ptr,
    inner,
    x_stride_outer,
    x_stride_inner,
    labels_ptr,
    log_probs_ptr,
    lse_ptr,
    entropy_ptr,
    reference_ptr,
    sum_ptr,
    vocab,
    inv_temperature,
    softcap,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label == IGNORE_INDEX:
        tl.store(log_probs_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(reference_ptr + row, 0.0)
        tl.store(sum_ptr + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
    else:
        x_row = x_ptr + (row // inner) * x_stride_outer + (row % inner) * x_stride_inner
        maximum, total, log_prob, lse, entropy = row_values(
            x_row, label, vocab, inv_temperature, softcap, CAP, BLOCK_V
        )
        tl.store(log_probs_ptr + row, log_prob)
        tl.store(lse_ptr + row, lse)
        tl.store(reference_ptr + row, maximum)
        tl.store(sum_ptr + row, total)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, entropy)


@row_kernel("HAS_ENTROPY", "CAP")
def _token_log_probs_bwd_kernel(
    x_ptr,
    inner,
    x_stride_outer,
    x_stride_inner,
    d_ptr,
    d_stride_outer,
    d_stride_inner,
    labels_ptr,
    reference_ptr,
    sum_ptr,
    entropy_ptr,
    dlog_probs_ptr,
    dentropy_ptr,
    vocab,
    inv_temperature,
    softcap,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    d_row = d_ptr + (row // inner) * d_stride_outer + (row % inner) * d_stride_inner
    g = 0.0
    k = 0.0
    entropy = 0.0
    if label != IGNORE_INDEX:
        g = tl.load(dlog_probs_ptr + row) * inv_temperature
        if HAS_ENTROPY:
            k = -tl.load(dentropy_ptr + row) * inv_temperature
            entropy = tl.load(entropy_ptr + row)
    if (g == 0.0) & (k == 0.0):
        write_zeros(d_row, vocab, BLOCK_V)
    else:
        x_row = x_ptr + (row // inner) * x_stride_outer + (row % inner) * x_stride_inner
        write_gradient(
            x_row,
            d_row,
            label,
            vocab,
            inv_temperature,
            softcap,
            tl.load(reference_ptr + row),
            tl.load(sum_ptr + row),
            entropy,
            g,
            k,
            CAP,
            HAS_ENTROPY,
            BLOCK_V,
        )


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    row_sums: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    if labels.numel() == 0:
        return
    arguments = row_arguments(logits, None) | {
        "labels_ptr": labels,
        "log_probs_ptr": log_probs,
        "lse_ptr": lse,
        "entropy_ptr": lse if entropy is None else entropy,
        "reference_ptr": row_sums[0],
        "sum_ptr": row_sums[1],
        "inv_temperature": 1.0 / temperature,
        "softcap": softcap,
    }
    launch_rows(
        _token_log_probs_fwd_kernel,
        labels.numel(),
        arguments,
        HAS_ENTROPY=entropy is not None,
        CAP=softcap > 0,
    )


def token_log_probs_backward(
    logits: Tensor,
    labels: Tensor,
    row_sums: Tensor,
    entropy: Tensor,
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    dlogits: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    if labels.numel() == 0:
        return
    arguments = row_arguments(logits, dlogits) | {
        "labels_ptr": labels,
        "reference_ptr": row_sums[0],
        "sum_ptr": row_sums[1],
        "entropy_ptr": row_sums if dentropy is None else entropy,
        "dlog_probs_ptr": dlog_probs,
        "dentropy_ptr": row_sums if dentropy is None else dentropy,
        "inv_temperature": 1.0 / temperature,
        "softcap": softcap,
    }
    launch_rows(
        _token_log_probs_bwd_kernel,
        labels.numel(),
        arguments,
        HAS_ENTROPY=dentropy is not None,
        CAP=softcap > 0,
    )
