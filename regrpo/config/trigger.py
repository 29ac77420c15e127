"""When a reflection opens."""

from dataclasses import dataclass

from regrpo.config.checks import require


@dataclass(frozen=True)
class TriggerConfig:
    """When a reflection opens, at most once a step: always after a typed failure.

    Args:
        confidence_margin: also after a call that worked but that the policy was less sure of than
            of the earlier steps' first calls: u < mean(earlier u) - confidence_margin, where u is
            the geometric mean of its tokens' probabilities; 0 is the paper's rule, null never.
    """

    confidence_margin: float | None = None

    def __post_init__(self) -> None:
        margin = self.confidence_margin
        require(
            margin is None or 0 <= margin < 1,
            "trigger.confidence_margin",
            margin,
            "0 or more and below 1, or null",
        )

    def require_reflect(self, reflect: bool) -> None:
        """Raises ValueError for the confidence clause without reflections.

        A retry after a call that worked would be told nothing of why.
        """
        require(
            reflect or self.confidence_margin is None,
            "trigger.confidence_margin",
            self.confidence_margin,
            "null where reflect is false",
        )
