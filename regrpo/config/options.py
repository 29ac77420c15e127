"""Options from neighbouring work."""

from dataclasses import dataclass

from regrpo.config.checks import require


@dataclass(frozen=True)
class OptionsConfig:
    """Options from neighbouring work, all off by default; ``regrpo.options`` has the formulas.

    Args:
        ratio_level: what has one clipped ratio: a "token", a "sequence" (GSPO), or a "segment",
            each reflection and each action apart.
        clip_target: adaptive clip bounds (BAPO): least share of the gradient that comes from
            positive advantages; null for the fixed bounds.
        clip_high_max: the upper bound of the ratio may go up to this.
        clip_low_max: the lower bound of the ratio may go up to this.
        clip_step: by how much a bound moves at a time.
        step_weight: weight of step-level advantages among turns in the same anchor state (GiGPO).
        step_gamma: discount of the reward a turn further back.
        demonstration_weight: weight of the NLL of executed demonstrations for states in which no
            trajectory succeeded (ReLIFT).
        penalty: most that reflecting and writing at length takes off a success, in successes
            (ARLCP).
        penalty_thresholds: reflection tokens up to which the reflection's part of the penalty is a
            quarter, and a half; beyond, three quarters.
        keep: trajectories a group that are trained on, those of greatest variance (D3S); null for
            all.
        replay: earlier trajectories that are kept, to join groups of the same state whose outcomes
            are all the same (R3).
        repeat_after: the states of an update come again this many updates later; null for never.
        refinements: further corrections that are sampled for a group without a success
            (Critique-GRPO).
        refinement_gamma: gamma of their shaped ratio p / (p + gamma).
    """

    ratio_level: str = "token"
    clip_target: float | None = None
    clip_high_max: float = 3.0
    clip_low_max: float = 0.9
    clip_step: float = 0.05
    step_weight: float = 0.0
    step_gamma: float = 1.0
    demonstration_weight: float = 0.0
    penalty: float = 0.0
    penalty_thresholds: tuple[int, int] = (40, 80)
    keep: int | None = None
    replay: int = 0
    repeat_after: int | None = None
    refinements: int = 0
    refinement_gamma: float = 0.1

    def __post_init__(self) -> None:
        levels = ("token", "sequence", "segment")
        for name, holds, expected in (
            ("ratio_level", self.ratio_level in levels, "token, sequence or segment"),
            (
                "clip_target",
                self.clip_target is None or 0 < self.clip_target < 1,
                "between 0 and 1, or null",
            ),
            # The bounds are found with token ratios.
            (
                "clip_target",
                self.clip_target is None or self.ratio_level == "token",
                f"null with ratio_level={self.ratio_level}",
            ),
            ("clip_high_max", self.clip_high_max > 1, "more than 1"),
            ("clip_low_max", 0 < self.clip_low_max < 1, "between 0 and 1"),
            ("clip_step", self.clip_step > 0, "a positive number"),
            ("step_weight", self.step_weight >= 0, "0 or more"),
            ("step_gamma", 0 < self.step_gamma <= 1, "above 0, at most 1"),
            ("demonstration_weight", self.demonstration_weight >= 0, "0 or more"),
            ("penalty", self.penalty >= 0, "0 or more"),
            (
                "penalty_thresholds",
                0 <= self.penalty_thresholds[0] <= self.penalty_thresholds[1],
                "0 <= first <= second",
            ),
            ("keep", self.keep is None or self.keep > 1, "2 or more, or null"),
            ("replay", self.replay >= 0, "0 or more"),
            # Without a state that comes again nothing could be replayed.
            (
                "replay",
                self.replay == 0 or self.repeat_after is not None,
                "0 without options.repeat_after",
            ),
            (
                "repeat_after",
                self.repeat_after is None or self.repeat_after > 0,
                "1 or more, or null",
            ),
            ("refinements", self.refinements >= 0, "0 or more"),
            ("refinement_gamma", self.refinement_gamma > 0, "a positive number"),
        ):
            require(holds, f"options.{name}", getattr(self, name), expected)
