"""The reward and the advantages made of it."""

from dataclasses import dataclass

from regrpo.config.checks import require


@dataclass(frozen=True)
class RewardConfig:
    """R = lambda_exec * success - eta * reflection tokens / tokens_per_cost + lambda_val * V.

    V is the training-time verifier of ``regrpo.rewards``; advantages are those of R in its group.

    Args:
        lambda_exec: weight of executed success.
        eta: weight of the reflection cost.
        eta_warmup_steps: updates over which eta grows linearly from 0. While most trajectories
            fail, a cost mostly pays for giving up sooner.
        tokens_per_cost: reflection tokens that cost one unit.
        lambda_val: weight of the verifier inside the reward.
        alpha: two-stream advantages instead, A_out + alpha * A_V: outcome and verifier are
            normalised (and clipped) apart; null for one stream.
        baseline: what a reward is compared with: "mean" of its group, "leave_one_out" (the mean of
            the others), or "none".
        scale: divide by the standard deviation of the "group", of the "batch", or not at all:
            "none".
        min_std: floor of that standard deviation, in units of reward: where all succeed, the
            differences in cost stay small.
        clip: advantages are clipped to [-clip, clip].
    """

    lambda_exec: float = 1.0
    eta: float = 0.1
    eta_warmup_steps: int = 0
    tokens_per_cost: float = 100.0
    lambda_val: float = 0.0
    alpha: float | None = None
    baseline: str = "mean"
    scale: str = "none"
    min_std: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        warmup = self.eta_warmup_steps
        require(warmup >= 0, "eta_warmup_steps", warmup, "0 or more")
        require(self.tokens_per_cost > 0, "tokens_per_cost", self.tokens_per_cost, "positive")
        require(self.lambda_val >= 0, "lambda_val", self.lambda_val, "0 or more")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "positive, or null")
        # With alpha the verifier would count twice.
        require(
            self.alpha is None or self.lambda_val == 0,
            "lambda_val",
            self.lambda_val,
            "0 with alpha",
        )
        require(
            self.baseline in ("mean", "leave_one_out", "none"),
            "baseline",
            self.baseline,
            "mean, leave_one_out or none",
        )
        scales = ("none", "group", "batch")
        require(self.scale in scales, "scale", self.scale, "none, group or batch")
        require(self.min_std >= 0, "min_std", self.min_std, "0 or more")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "positive, or null")
