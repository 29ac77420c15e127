"""Attention over some of the keys, whose parts are joined by their log-sum-exps."""

import math

import torch
from torch.nn import functional as F

LOWEST = torch.finfo(torch.float32).min
SCORES = 2**26  # attention scores that are held at a time, at most


def spans(count: int, scores: int) -> list[slice]:
    """``count`` queries of ``scores`` scores each, in parts of ``SCORES`` at most."""
    step = max(1, SCORES // scores)
    return [slice(first, first + step) for first in range(0, count, step)]


def bias_of(positions: torch.Tensor, queries: torch.Tensor, window: int | None) -> torch.Tensor:
    """[B, n, M]: 0 where a query at ``queries`` [B, n] sees a column at ``positions`` [B, M], -inf
    elsewhere."""
    hidden = positions[:, None] > queries[..., None]
    if window is not None:
        hidden = hidden | (positions[:, None] <= queries[..., None] - window)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)


def partial_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    bias: torch.Tensor,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, n, D] over some of the keys, with the lse [B, heads, n], in float32 (in
    float64 of a model in that).

    Query heads of a key head are laid side by side (grouped-query attention), so keys are read
    once. Where every key is biased away the lse is -inf and the output 0.
    """
    batch, heads, count, width = query.shape
    shared = keys.shape[1]
    side = query.reshape(batch, shared, heads // shared * count, width)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (side @ keys.transpose(2, 3)).to(exact).mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(batch, shared, heads // shared, count, -1).add_(bias[:, None, None])
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.clamp(min=LOWEST)[..., None]).exp_()
    out = (weights.to(values.dtype) @ values).to(exact)
    return out.view(batch, heads, count, -1), lse.view(batch, heads, count)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of the prompts, [G, heads, P, D]."""
    groups, heads, length, _ = query.shape
    if softcap is not None:
        positions = torch.arange(length, device=query.device)[None]
        parts = []
        for span in spans(length, groups * heads * length):
            bias = bias_of(positions, positions[:, span], window)
            part = partial_attention(query[:, :, span], key, value, scaling, bias, softcap)
            parts.append(part[0])
        return torch.cat(parts, dim=2).to(query.dtype)
    mask = None
    if window is not None and length > window:
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = ((distance >= 0) & (distance < window)).to(query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
