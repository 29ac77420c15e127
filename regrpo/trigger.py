"""When a reflection block opens: a deterministic rule, no judge model (arXiv 2606.31392).

``g_i = ToolError or EmptyObs or (i > 1 and u_i < kappa_i - margin)``, with the policy's confidence
in a call ``u_i = exp(mean log pi(action tokens))`` and ``kappa_i`` the mean of the earlier ``u_j``.

What failed is read off the type of the observation, never off its text. ``u`` is that of a step's
first call, thought and code; the reflection and the correction behind it never count: with the
repair spelled out above it a correction is near certain, and would raise the bar for every first
call after it. A ``final_answer`` ends an episode before the confidence clause is asked.
"""

import math
from collections.abc import Sequence
from enum import Enum

from regrpo.config import TriggerConfig
from regrpo.tools.observation import Status


class Clause(str, Enum):
    """What opened a reflection (without reflections: a retry)."""

    FAILURE = "failure"
    CONFIDENCE = "confidence"


def confidence(log_probs: Sequence[float]) -> float | None:
    """The geometric mean of the tokens' probabilities, in (0, 1]; None without any token."""
    return math.exp(math.fsum(log_probs) / len(log_probs)) if log_probs else None


def fired(
    status: Status,
    certainty: float | None,
    earlier: Sequence[float],
    config: TriggerConfig,
) -> Clause | None:
    """The clause that fires on a step's first call, or None.

    Args:
        status: of its observation.
        certainty: its ``confidence``; None for a call that the second clause is not asked about.
        earlier: those of the steps before it; without any, only a failure fires.
    """
    if status is not Status.OK:
        return Clause.FAILURE
    margin = config.confidence_margin
    if margin is None or certainty is None or not earlier:
        return None
    return Clause.CONFIDENCE if certainty < math.fsum(earlier) / len(earlier) - margin else None
