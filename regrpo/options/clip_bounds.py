"""Adaptive clip bounds: positive advantages carry at least a share of the gradient.

After "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization
with Adaptive Clipping" (arXiv 2510.18927). With ratios r and advantages A, the share at bounds
[low, high] is that of the tokens whose gradient is not clipped away:

    P = sum of r A over A > 0, r <= high;  N = sum of r |A| over A < 0, r >= low
    share = P / (P + N)

While it is under the target, ``high`` goes up by a step, to its limit, then ``low``. Both can only
raise the share. The bounds are found anew in every pass over an update's tokens.

Differs: the authors' release compares sums of the clipped surrogate, in which a token keeps its
value where its gradient is cut, and moves the lower bound first.
"""

from typing import NamedTuple

import torch


class ClipBounds(NamedTuple):
    """The ratio is clipped to [low, high]; ``share`` is what positive advantages contribute."""

    low: float
    high: float
    share: float


def adaptive_bounds(
    log_ratios: torch.Tensor,
    advantages: torch.Tensor,
    *,
    low: float,
    high: float,
    low_max: float,
    high_max: float,
    step: float,
    target: float,
) -> ClipBounds:
    """The first bounds, from ``low`` and ``high`` on, at which the share reaches ``target``.

    Args:
        log_ratios, advantages: [N], of the trained tokens.
    """
    weight = log_ratios.double().clamp(-20, 20).exp()
    ratio, weight = weight, weight * advantages.double().abs()

    def share(low: float, high: float) -> float:
        positive = weight[(advantages > 0) & (ratio <= high)].sum().item()
        negative = weight[(advantages < 0) & (ratio >= low)].sum().item()
        return positive / (positive + negative) if negative else 1.0

    reached = share(low, high)
    while reached < target and (high < high_max or low < low_max):
        if high < high_max:
            high = min(high + step, high_max)
        else:
            low = min(low + step, low_max)
        reached = share(low, high)
    return ClipBounds(low, high, reached)
