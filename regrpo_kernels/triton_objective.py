"""The per-token objective in Triton, and what sequence-level ratios do between the row passes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regrpo_kernels.objective import KL_ESTIMATORS, POLICIES
from regrpo_kernels.triton_row import INFINITY

_MAX_LOG_RATIO = tl.constexpr(20.0)
_CLIP = tl.constexpr(POLICIES.index("clip"))
_CISPO = tl.constexpr(POLICIES.index("cispo"))
_SAPO = tl.constexpr(POLICIES.index("sapo"))
_REINFORCE = tl.constexpr(POLICIES.index("reinforce"))
_K1 = tl.constexpr(KL_ESTIMATORS.index("k1"))
_K3 = tl.constexpr(KL_ESTIMATORS.index("k3"))


@triton.jit
def _clamp_log_ratio(x):
    """NaN goes through."""
    x = tl.where(x > _MAX_LOG_RATIO, _MAX_LOG_RATIO, x)
    return tl.where(x < -_MAX_LOG_RATIO, -_MAX_LOG_RATIO, x)


@triton.jit
def _log_ratio(log_prob, old):
    """A label at -inf is far below any `old`."""
    return tl.where(log_prob == -INFINITY, -INFINITY, log_prob - old)


@triton.jit
def token_ratio(log_prob, old, HAS_OLD: tl.constexpr):
    """`(ratio, d ratio / d log_prob)`; a label at -inf has ratio 0 and nothing is pushed."""
    raw = 0.0
    if HAS_OLD:
        raw = _log_ratio(log_prob, old)
    ratio = tl.where(log_prob == -INFINITY, 0.0, tl.exp(_clamp_log_ratio(raw)))
    return ratio, tl.where(tl.abs(raw) > _MAX_LOG_RATIO, 0.0, ratio)


@triton.jit
def token_objective(
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
    POLICY: tl.constexpr,
    KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """`(loss, d loss / d log_prob, kl, clip_low, clip_high)`: csrc/objective.h, in Triton."""
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
        dclipped = tl.where((ratio < low) | (ratio > high), 0.0, dratio)
        dlog_prob = -advantage * tl.where(unclipped, dcapped, dclipped)
    elif POLICY == _CISPO:
        weight = clipped * advantage
        loss = tl.where(weight == 0.0, 0.0, -weight * log_prob)
        dlog_prob = -weight
    elif POLICY == _SAPO:
        tau = tl.where(advantage > 0, sapo_tau_pos, sapo_tau_neg)
        x = tau * (ratio - 1.0)
        e = tl.exp(-tl.abs(x))
        s = tl.where(x < 0, e, 1.0) / (1.0 + e)
        loss = -4.0 / tau * s * advantage
        # s (1 - s) would cancel
        dlog_prob = -4.0 * (e / ((1.0 + e) * (1.0 + e))) * advantage * dratio
    else:
        weight = advantage if POLICY == _REINFORCE else 1.0
        loss = tl.where(weight == 0.0, 0.0, -weight * log_prob)
        dlog_prob = -weight

    kl = 0.0
    if HAS_REF:
        raw_kl = tl.where((log_prob == -INFINITY) & (ref == -INFINITY), 0.0, ref - log_prob)
        x = _clamp_log_ratio(raw_kl)
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
    return loss, dlog_prob, kl, clip_low, clip_high


@triton.jit
def store_stats(stats_ptr, offsets, live, stride, loss, kl, ratio, clip_low, clip_high, dlog_prob):
    """All statistics but log_prob, lse and entropy (rows 1 to 3), in the order of GrpoStat."""
    tl.store(stats_ptr + offsets, loss, mask=live)
    tl.store(stats_ptr + 4 * stride + offsets, kl, mask=live)
    tl.store(stats_ptr + 5 * stride + offsets, ratio, mask=live)
    tl.store(stats_ptr + 6 * stride + offsets, clip_low, mask=live)
    tl.store(stats_ptr + 7 * stride + offsets, clip_high, mask=live)
    tl.store(stats_ptr + 8 * stride + offsets, dlog_prob, mask=live)


@triton.jit(do_not_specialize=["num_tokens"])
def _sequence_objective_kernel(
    cu_seqlens_ptr,
    mask_ptr,
    weights_ptr,
    advantages_ptr,
    old_ptr,
    ref_ptr,
    stats_ptr,
    num_tokens,
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
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    # nobody has looked at the values of cu_seqlens on the device
    begin = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_tokens)
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    if HAS_OLD:
        totals = tl.zeros([BLOCK], tl.float64)
        counts = tl.zeros([BLOCK], tl.float64)
        for start in range(begin, end, BLOCK):
            t = start + lane
            trained = (t < end) & (tl.load(mask_ptr + t, mask=t < end, other=0) != 0)
            log_prob = tl.load(stats_ptr + num_tokens + t, mask=trained, other=0.0)
            old = tl.load(old_ptr + t, mask=trained, other=0.0)
            d = _clamp_log_ratio(_log_ratio(log_prob, old))
            totals += tl.where(trained, d, 0.0).to(tl.float64)
            counts += trained.to(tl.float64)
        mean = (tl.sum(totals, 0) / tl.maximum(tl.sum(counts, 0), 1.0)).to(tl.float32)
    for start in range(begin, end, BLOCK):
        t = start + lane
        trained = (t < end) & (tl.load(mask_ptr + t, mask=t < end, other=0) != 0)
        log_prob = tl.load(stats_ptr + num_tokens + t, mask=trained, other=0.0)
        ratio = tl.where(log_prob == -INFINITY, 0.0, tl.exp(mean))
        advantage = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_ADVANTAGES:
            advantage = tl.load(advantages_ptr + t, mask=trained, other=0.0)
        ref = 0.0
        if HAS_REF:
            ref = tl.load(ref_ptr + t, mask=trained, other=0.0)
        loss, dlog_prob, kl, clip_low, clip_high = token_objective(
            log_prob,
            ratio,
            ratio,
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
            loss -= entropy_coef * tl.load(stats_ptr + 3 * num_tokens + t, mask=trained, other=0.0)
        weight = tl.load(weights_ptr + t, mask=trained, other=0.0)
        store_stats(
            stats_ptr,
            t,
            t < end,
            num_tokens,
            tl.where(trained, loss, 0.0),
            tl.where(trained, kl, 0.0),
            tl.where(trained, ratio, 0.0),
            tl.where(trained, clip_low, 0.0),
            tl.where(trained, clip_high, 0.0),
            tl.where(trained, weight * dlog_prob, 0.0),
        )


_OPTIONS = (
    "epsilon_low",
    "epsilon_high",
    "delta",
    "beta",
    "entropy_coef",
    "sapo_tau_pos",
    "sapo_tau_neg",
)


def objective_arguments(
    mask: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    policy: str,
    kl_estimator: str,
    options: dict[str, float],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every kernel with an objective takes: arguments and flags."""
    arguments = {
        "mask_ptr": mask.view(torch.uint8),
        "weights_ptr": weights,
        "advantages_ptr": weights if advantages is None else advantages,
        "old_ptr": weights if old_log_probs is None else old_log_probs,
        "ref_ptr": weights if ref_log_probs is None else ref_log_probs,
        **{name: options[name] for name in _OPTIONS},
    }
    flags = {
        "POLICY": POLICIES.index(policy),
        "KL": KL_ESTIMATORS.index(kl_estimator),
        "HAS_ADVANTAGES": advantages is not None,
        "HAS_OLD": old_log_probs is not None,
        "HAS_REF": ref_log_probs is not None,
        "HAS_DELTA": options["delta"] > 0,
        "HAS_ENTROPY": options["entropy_coef"] != 0,
    }
    return arguments, flags


def sequence_objective(cu_seqlens: Tensor, stats: Tensor, *token_arguments: Any) -> None:
    """One program a sequence: its mean log-ratio, then the objective of its tokens. The arguments
    are those of `objective_arguments`.
    """
    arguments, flags = objective_arguments(*token_arguments)
    _sequence_objective_kernel[(len(cu_seqlens) - 1,)](
        cu_seqlens_ptr=cu_seqlens,
        stats_ptr=stats,
        num_tokens=stats[0].numel(),
        **arguments,
        **flags,
        BLOCK=1024,
    )
