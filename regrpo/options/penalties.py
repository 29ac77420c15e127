"""Reflection and length penalties on correct answers only.

"Stop Unnecessary Reflection: Training LRMs for Efficient Reasoning with Adaptive Reflection and
Length Coordinated Penalty" (ARLCP, arXiv 2602.12113). What a trajectory that succeeds is worth:

    1 - a1 sigmoid(z(reflection)) - a2 sigmoid(z(length)),    a1 + a2 = penalty

z(x) = (x - mean) / (std + 1e-6) over the group's successes (std 1 of one alone). The longer the
reflection, the more of the penalty is its own: a1 = penalty / 4 up to the first threshold,
penalty / 2 up to the second, 3 penalty / 4 beyond. A failure loses nothing.

Differs: reflection is counted in tokens of the block, not in words such as "wait".
"""

import math
import statistics
from collections.abc import Sequence


def success_penalties(
    reflections: Sequence[int],
    lengths: Sequence[int],
    success: Sequence[bool],
    groups: Sequence[int],
    *,
    penalty: float,
    thresholds: tuple[int, int],
) -> list[tuple[float, float]]:
    """What reflection and length take off every trajectory, in successes; (0, 0) of a failure.

    Args:
        reflections, lengths: reflection and trained tokens of the trajectories.
        groups: trajectories of one id are compared.
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        if success[i]:
            members.setdefault(group, []).append(i)
    taken = [(0.0, 0.0)] * len(success)
    for indices in members.values():
        by_reflection = _sigmoid_of_z([reflections[i] for i in indices])
        by_length = _sigmoid_of_z([lengths[i] for i in indices])
        for i, r, n in zip(indices, by_reflection, by_length, strict=True):
            above = sum(reflections[i] > t for t in thresholds)
            a1 = penalty * (0.25, 0.5, 0.75)[above]
            taken[i] = (a1 * r, (penalty - a1) * n)
    return taken


def _sigmoid_of_z(values: list[int]) -> list[float]:
    mean = statistics.mean(values)
    std = statistics.stdev(values) if len(values) > 1 else 1.0
    return [1 / (1 + math.exp(-(v - mean) / (std + 1e-6))) for v in values]
