"""Triton kernels of the vocabulary-sized ops: one program a row, a loop over blocks of the row.

Lengths are never compile-time constants: a new T, B or L compiles nothing. The second pass over a
row runs backwards, so that it starts with what the first one left in cache. No atomics: two runs
give the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from regrpo_kernels._library import rows
from regrpo_kernels.objective import KL_ESTIMATORS, POLICIES

_LOG2E = tl.constexpr(1.4426950408889634)
_FLOOR = tl.constexpr(-1e30)  # for d: keeps 0 * -inf out of the entropy
_MAX_LOG_RATIO = tl.constexpr(20.0)
_IGNORE_INDEX = tl.constexpr(-100)
_INFINITY = tl.constexpr(math.inf)
_CLIP = tl.constexpr(POLICIES.index("clip"))
_CISPO = tl.constexpr(POLICIES.index("cispo"))
_SAPO = tl.constexpr(POLICIES.index("sapo"))
_REINFORCE = tl.constexpr(POLICIES.index("reinforce"))
_K1 = tl.constexpr(KL_ESTIMATORS.index("k1"))
_K3 = tl.constexpr(KL_ESTIMATORS.index("k3"))

_LENGTHS = ["num_rows", "inner", "x_stride_outer", "d_stride_outer"]
_NUM_WARPS = 8


@triton.jit
def _cap(x, softcap, CAP: tl.constexpr):
    """Softcap c tanh(x / c), from one exponential of a non-positive number."""
    if CAP:
        t = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E / softcap))
        magnitude = softcap * (1.0 - t) / (1.0 + t)
        x = tl.where(x < 0, -magnitude, magnitude)
    return x


@triton.jit
def _row_values(
    x_ptr, label, vocab, inv_temperature, softcap, CAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """First pass: `(maximum, sum, log sum, log_prob, lse, entropy)` of a row."""
    scale = inv_temperature * _LOG2E
    z_label = _cap(tl.load(x_ptr + label).to(tl.float32), softcap, CAP)
    maximum = -_INFINITY
    total = 0.0
    moment = 0.0  # sum of e * d, d = z - maximum
    for start in range(0, vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + cols, mask=cols < vocab, other=-_INFINITY).to(tl.float32)
        z = tl.where(cols < vocab, _cap(x, softcap, CAP), -_INFINITY)
        raised = tl.maximum(maximum, tl.max(z, axis=0))
        reference = tl.where(raised == -_INFINITY, 0.0, raised)
        shift = tl.where(maximum == -_INFINITY, 0.0, maximum - reference)
        shrink = tl.exp2(shift * scale)
        d = tl.where(z == -_INFINITY, _FLOOR, z - reference)
        e = tl.exp2(d * scale)
        moment = shrink * (moment + shift * total) + tl.sum(e * d, axis=0)
        total = shrink * total + tl.sum(e, axis=0)
        maximum = raised
    log_sum = tl.log(total)
    log_prob = tl.minimum((z_label - maximum) * inv_temperature - log_sum, 0.0)
    lse = maximum * inv_temperature + log_sum
    entropy = tl.maximum(log_sum - inv_temperature * moment / total, 0.0)
    return maximum, total, log_sum, log_prob, lse, entropy


@triton.jit
def _write_gradient(
    x_ptr,
    d_ptr,
    label,
    vocab,
    inv_temperature,
    softcap,
    reference,
    a,
    b,
    at_label,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Second pass: `e * (b + a d)`, plus `at_label` for the label, with `d = z - reference`."""
    blocks = tl.cdiv(vocab, BLOCK_V)
    for i in range(0, blocks):
        cols = (blocks - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
        live = cols < vocab
        z = _cap(tl.load(x_ptr + cols, mask=live, other=0.0).to(tl.float32), softcap, CAP)
        d = tl.where(z == -_INFINITY, _FLOOR, z - reference)
        e = tl.exp2(d * (inv_temperature * _LOG2E))
        v = e * (b + a * d) if ENTROPY else e * b
        v = tl.where(cols == label, v + at_label, v)
        if CAP:
            v = v * (1.0 - (z / softcap) * (z / softcap))
        tl.store(d_ptr + cols, v.to(d_ptr.dtype.element_ty), mask=live)


@triton.jit
def _write_zeros(d_ptr, vocab, BLOCK_V: tl.constexpr):
    for start in range(0, vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        zeros = tl.zeros([BLOCK_V], dtype=d_ptr.dtype.element_ty)
        tl.store(d_ptr + cols, zeros, mask=cols < vocab)


@triton.jit(do_not_specialize=_LENGTHS)
def _token_log_probs_fwd_kernel(
    x_ptr,
    inner,
    x_stride_outer,
    x_stride_inner,
    labels_ptr,
    log_probs_ptr,
    lse_ptr,
    entropy_ptr,
    vocab,
    inv_temperature,
    softcap,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label == _IGNORE_INDEX:
        tl.store(log_probs_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
    else:
        x_row = x_ptr + (row // inner) * x_stride_outer + (row % inner) * x_stride_inner
        _, _, _, log_prob, lse, entropy = _row_values(
            x_row, label, vocab, inv_temperature, softcap, CAP, BLOCK_V
        )
        tl.store(log_probs_ptr + row, log_prob)
        tl.store(lse_ptr + row, lse)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=_LENGTHS)
def _token_log_probs_bwd_kernel(
    x_ptr,
    inner,
    x_stride_outer,
    x_stride_inner,
    d_ptr,
    d_stride_outer,
    d_stride_inner,
    labels_ptr,
    lse_ptr,
    entropy_ptr,
    dlog_probs_ptr,
    dentropy_ptr,
    vocab,
    temperature,
    inv_temperature,
    softcap,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    d_row = d_ptr + (row // inner) * d_stride_outer + (row % inner) * d_stride_inner
    if label == _IGNORE_INDEX:
        _write_zeros(d_row, vocab, BLOCK_V)
    else:
        x_row = x_ptr + (row // inner) * x_stride_outer + (row % inner) * x_stride_inner
        # p = exp((z - lse * temperature) / temperature)
        reference = tl.load(lse_ptr + row) * temperature
        g = tl.load(dlog_probs_ptr + row) * inv_temperature
        a = 0.0
        b = -g
        if HAS_ENTROPY:
            k = -tl.load(dentropy_ptr + row) * inv_temperature
            a = k * inv_temperature
            b = k * tl.load(entropy_ptr + row) - g
        _write_gradient(
            x_row,
            d_row,
            label,
            vocab,
            inv_temperature,
            softcap,
            reference,
            a,
            b,
            g,
            CAP,
            HAS_ENTROPY,
            BLOCK_V,
        )


@triton.jit
def _token_objective(
    log_prob,
    old,
    ref,
    advantage,
    epsilon_low,
    epsilon_high,
    delta,
    beta,
    sapo_tau_pos,
    sapo_tau_neg,
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """`(loss, d loss / d log_prob, kl, ratio, clip_low, clip_high)`: csrc/objective.h, in
    Triton.
    """
    forbidden = log_prob == -_INFINITY
    raw = 0.0
    if HAS_OLD:
        raw = tl.where(forbidden, -_INFINITY, log_prob - old)
    d = tl.minimum(tl.maximum(raw, -_MAX_LOG_RATIO), _MAX_LOG_RATIO)
    ratio = tl.where(forbidden, 0.0, tl.exp(d))
    dratio = tl.where(tl.abs(raw) > _MAX_LOG_RATIO, 0.0, ratio)
    low = 1.0 - epsilon_low
    high = 1.0 + epsilon_high
    clipped = tl.minimum(tl.maximum(ratio, low), high)

    if POLICY == _CLIP:
        capped = ratio
        dcapped = dratio
        if HAS_DELTA:
            capped = tl.minimum(ratio, delta)
            dcapped = tl.where(ratio > delta, 0.0, dratio)
        unclipped = capped * advantage <= clipped * advantage
        loss = -tl.where(unclipped, capped, clipped) * advantage
        dlog_prob = tl.where(unclipped, -advantage * dcapped, 0.0)
    elif POLICY == _CISPO:
        weight = clipped * advantage
        loss = tl.where(weight == 0.0, 0.0, -weight * log_prob)
        dlog_prob = -weight
    elif POLICY == _SAPO:
        tau = tl.where(advantage > 0, sapo_tau_pos, sapo_tau_neg)
        s = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -4.0 / tau * s * advantage
        dlog_prob = -4.0 * s * (1.0 - s) * advantage * dratio
    else:
        weight = advantage if POLICY == _REINFORCE else 1.0
        loss = tl.where(weight == 0.0, 0.0, -weight * log_prob)
        dlog_prob = -weight

    kl = 0.0
    if HAS_REF:
        raw_kl = tl.where(forbidden & (ref == -_INFINITY), 0.0, ref - log_prob)
        x = tl.minimum(tl.maximum(raw_kl, -_MAX_LOG_RATIO), _MAX_LOG_RATIO)
        if KL == _K3:
            # e^x - 1 - x cancels near 0, where its series takes over
            series = x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0)))
            kl = tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0 - x)
            dkl = -(kl + x)
        else:
            kl = -x if KL == _K1 else 0.5 * x * x
            dkl = -x
        loss += beta * kl
        dlog_prob += tl.where(tl.abs(raw_kl) <= _MAX_LOG_RATIO, beta * dkl, 0.0)
    clip_low = tl.where((ratio < low) & (advantage < 0), 1.0, 0.0)
    clip_high = tl.where((ratio > high) & (advantage > 0), 1.0, 0.0)
    return loss, dlog_prob, kl, ratio, clip_low, clip_high


@triton.jit(do_not_specialize=_LENGTHS)
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
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row
    d_row = d_ptr + (row // inner) * d_stride_outer + (row % inner) * d_stride_inner
    if tl.load(mask_ptr + row) == 0:
        for i in tl.static_range(9):
            tl.store(stats + i * num_rows, 0.0)
        if HAS_GRADIENT:
            _write_zeros(d_row, vocab, BLOCK_V)
    else:
        label = tl.load(labels_ptr + row)
        x_row = x_ptr + (row // inner) * x_stride_outer + (row % inner) * x_stride_inner
        maximum, total, log_sum, log_prob, lse, entropy = _row_values(
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
        loss, dlog_prob, kl, ratio, clip_low, clip_high = _token_objective(
            log_prob,
            old,
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
            HAS_OLD,
            HAS_REF,
            HAS_DELTA,
        )
        if HAS_ENTROPY:
            loss -= entropy_coef * entropy
        tl.store(stats, loss)
        tl.store(stats + num_rows, log_prob)
        tl.store(stats + 2 * num_rows, lse)
        tl.store(stats + 3 * num_rows, entropy)
        tl.store(stats + 4 * num_rows, kl)
        tl.store(stats + 5 * num_rows, ratio)
        tl.store(stats + 6 * num_rows, clip_low)
        tl.store(stats + 7 * num_rows, clip_high)
        dlog_prob *= tl.load(weights_ptr + row)
        tl.store(stats + 8 * num_rows, dlog_prob)
        if HAS_GRADIENT:
            weight = tl.load(weights_ptr + row) * inv_temperature
            g = dlog_prob * inv_temperature
            a = 0.0
            b = -g / total
            if HAS_ENTROPY:
                k = weight * entropy_coef
                a = k * inv_temperature / total
                b = (k * (entropy - log_sum) - g) / total
            _write_gradient(
                x_row,
                d_row,
                label,
                vocab,
                inv_temperature,
                softcap,
                maximum,
                a,
                b,
                g,
                CAP,
                HAS_ENTROPY,
                BLOCK_V,
            )


@triton.jit(do_not_specialize=_LENGTHS)
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


# --- launchers ----------------------------------------------------------------------------------


def _block(vocab: int) -> int:
    return min(triton.next_power_of_2(vocab), 4096)


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    if labels.numel() == 0:
        return
    _token_log_probs_fwd_kernel[(labels.numel(),)](
        logits,
        *rows(logits)[1:],
        labels,
        log_probs,
        lse,
        entropy if entropy.numel() else lse,
        logits.shape[-1],
        1.0 / temperature,
        softcap,
        HAS_ENTROPY=entropy.numel() > 0,
        CAP=softcap > 0,
        BLOCK_V=_block(logits.shape[-1]),
        num_warps=_NUM_WARPS,
    )


def token_log_probs_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    dlogits: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    if labels.numel() == 0:
        return
    _token_log_probs_bwd_kernel[(labels.numel(),)](
        logits,
        *rows(logits)[1:],
        dlogits,
        *rows(dlogits)[2:],
        labels,
        lse,
        lse if dentropy is None else entropy,
        dlog_probs,
        lse if dentropy is None else dentropy,
        logits.shape[-1],
        temperature,
        1.0 / temperature,
        softcap,
        HAS_ENTROPY=dentropy is not None,
        CAP=softcap > 0,
        BLOCK_V=_block(logits.shape[-1]),
        num_warps=_NUM_WARPS,
    )


def grpo_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    policy: str,
    kl_estimator: str,
    options: dict[str, float],
    stats: Tensor,
    dlogits: Tensor | None,
) -> None:
    if labels.numel() == 0:
        return
    o = options
    _grpo_loss_fwd_kernel[(labels.numel(),)](
        logits,
        *rows(logits)[1:],
        logits if dlogits is None else dlogits,
        *rows(logits if dlogits is None else dlogits)[2:],
        labels,
        mask.view(torch.uint8),
        weights,
        weights if advantages is None else advantages,
        weights if old_log_probs is None else old_log_probs,
        weights if ref_log_probs is None else ref_log_probs,
        stats,
        labels.numel(),
        logits.shape[-1],
        1.0 / o["temperature"],
        o["softcap"],
        o["epsilon_low"],
        o["epsilon_high"],
        o["delta"],
        o["beta"],
        o["entropy_coef"],
        o["sapo_tau_pos"],
        o["sapo_tau_neg"],
        POLICY=POLICIES.index(policy),
        KL=KL_ESTIMATORS.index(kl_estimator),
        HAS_ADVANTAGES=advantages is not None,
        HAS_OLD=old_log_probs is not None,
        HAS_REF=ref_log_probs is not None,
        HAS_DELTA=o["delta"] > 0,
        HAS_ENTROPY=o["entropy_coef"] != 0,
        HAS_GRADIENT=dlogits is not None,
        CAP=o["softcap"] > 0,
        BLOCK_V=_block(logits.shape[-1]),
        num_warps=_NUM_WARPS,
    )


def scale_gradient(dlogits: Tensor, scale: Tensor) -> None:
    """`dlogits *= scale`, decided on the device: a scale of 1 costs neither a pass nor a sync."""
    num_rows = dlogits.numel() // dlogits.shape[-1]
    if num_rows == 0:
        return
    _scale_gradient_kernel[(num_rows,)](
        dlogits,
        *rows(dlogits)[1:],
        scale,
        dlogits.shape[-1],
        BLOCK_V=_block(dlogits.shape[-1]),
        num_warps=_NUM_WARPS,
    )
