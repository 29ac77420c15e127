"""What an update reports: what the policy did, means over packs, and both over processes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from regrpo.distributed import Ranks
from regrpo.packing import PackedBatch
from regrpo.rollout import Trajectory
from regrpo.trainer import mean

# Of the processes' parts of an update these add up; other metrics are means.
SUMS = {
    "loss",
    "demonstration/count",
    "demonstration/nll",
    "groups/resampled",
    "groups/skipped",
    "refinement/count",
    "replay/joined",
    "replay/stored",
    "sampled/trajectories",
    "skipped/too_long",
    "states/without_near_miss",
    "tokens",
    "trained_tokens",
    "trajectories",
}


class Outcome(NamedTuple):
    """What is reported of a sampled trajectory; small, because processes exchange it."""

    group: int
    success: bool
    reward: float
    forced: bool
    corrected: bool
    reflected: bool
    reflected_in_vain: bool
    reflection_tokens: int
    trained_tokens: int


def outcomes(
    trajectories: Sequence[Trajectory], rewards: torch.Tensor, groups: Sequence[int]
) -> list[Outcome]:
    """Of the policy's own trajectories, without what joined their groups."""
    return [
        Outcome(
            group,
            t.success,
            reward,
            t.start.failed,
            any(turn.correction for turn in t.turns),
            any(turn.reflection_tokens for turn in t.turns),
            any(turn.reflection_tokens and not turn.correction for turn in t.turns),
            t.reflection_tokens,
            t.trained_tokens,
        )
        for t, reward, group in zip(trajectories, rewards.tolist(), groups, strict=True)
        if t.origin == "policy"
    ]


def rollout_metrics(parts: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """What the sampled trajectories of an update did, those of every process together."""
    sampled = [outcome for part in parts for outcome in part]
    corrected = [o for o in sampled if o.corrected]
    free = [o for o in sampled if not o.forced]
    seen: dict[tuple[int, int], set[bool]] = {}
    for rank, part in enumerate(parts):
        for o in part:
            seen.setdefault((rank, o.group), set()).add(o.success)
    rewards = torch.tensor([o.reward for o in sampled])
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item(),
        "success": mean(o.success for o in sampled),
        "success/first_try": mean(o.success and not o.corrected for o in free),
        "recovery": mean(o.success for o in corrected),
        "reflection/rate": mean(o.reflected for o in sampled),
        "reflection/tokens": mean(o.reflection_tokens for o in corrected),
        "reflection/unneeded": mean(o.reflected_in_vain for o in free),
        "completion/tokens": mean(o.trained_tokens for o in sampled),
        "groups/all_succeeded": mean(s == {True} for s in seen.values()),
        "groups/all_failed": mean(s == {False} for s in seen.values()),
    }


def pack_metrics(
    parts: Sequence[Mapping[str, float]], packs: Sequence[PackedBatch]
) -> dict[str, float]:
    """Of the packs of an update: losses add up, others are means over trained tokens, or bounds."""
    trained = [float(batch.loss_mask.sum()) for batch in packs]
    return combined(list(zip(parts, trained, strict=True))) if parts else {"loss": 0.0}


def over_ranks(ranks: Ranks, metrics: Mapping[str, float], weight: float) -> dict[str, float]:
    """What each process has of a metric, ``combined``; a collective."""
    return dict(metrics) if ranks.size == 1 else combined(ranks.gather((metrics, weight)))


def combined(parts: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Metrics of parts of an update, each with its weight, as those of the whole.

    What counts (``SUMS``) adds up, ``/min`` and ``/max`` are bounds, everything else is the mean by
    weight over the parts that have it. That is what one process would report where the metric is
    itself a mean over what is weighed, and an approximation elsewhere.
    """
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for part, _ in parts for name in part):
        found = [(part[name], weight) for part, weight in parts if name in part]
        # What a part without weight has is made of nothing.
        values = [value for value, weight in found if weight > 0]
        if name in SUMS:
            metrics[name] = sum(value for value, _ in found)
        elif not values:
            continue
        elif name.endswith("/min"):
            metrics[name] = min(values)
        elif name.endswith(("/max", "/resample_rounds")):
            metrics[name] = max(values)
        else:
            weighted = sum(value * weight for value, weight in found if weight > 0)
            metrics[name] = weighted / sum(weight for _, weight in found)
    return metrics
