"""Trajectories -> rewards -> advantages -> which of them are trained on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from regrpo.config import RewardConfig, TrainConfig
from regrpo.distributed import ALONE, Ranks
from regrpo.options.down_sampling import max_variance_subset
from regrpo.options.penalties import success_penalties
from regrpo.options.step_advantages import spread_over_tokens, step_advantages
from regrpo.packing import PackedBatch
from regrpo.rewards import verifier_scores, verifier_value
from regrpo.rollout import Trajectory
from regrpo.trainer import mean
from regrpo_kernels import (
    ReflectionAdvantages,
    group_advantages,
    reflection_advantages,
)


def group_ids(count: int, size: int) -> list[int]:
    """Ids of consecutive groups of one size."""
    return [i // size for i in range(count)]


def advantages_of(
    trajectories: Sequence[Trajectory],
    batch: PackedBatch,
    config: TrainConfig,
    groups: Sequence[int] | None = None,
    step: int | None = None,
) -> tuple[ReflectionAdvantages, dict[str, float]]:
    """Rewards and group advantages, and metrics of what went into them.

    Args:
        batch: the trajectories, in their order.
        groups: ids of the groups; None for consecutive ones of ``config.group_size``.
        step: the update, for ``reward.eta_warmup_steps``; None for one behind them.
    """
    groups = groups or group_ids(len(trajectories), config.group_size)
    reward, options = config.reward, config.options
    rule: dict[str, Any] = {
        "baseline": reward.baseline,
        "scale": reward.scale,
        "min_std": reward.min_std,
        "clip": reward.clip,
    }
    metrics: dict[str, float] = {}
    values = None
    if reward.lambda_val > 0 or reward.alpha is not None:
        scores = [verifier_scores(t) for t in trajectories]
        values = torch.tensor([verifier_value(s) for s in scores])
        names = scores[0] if scores else ()
        metrics |= {f"verifier/{name}": mean(s[name] for s in scores) for name in names}
    success = torch.tensor([float(t.success) for t in trajectories])
    if options.penalty > 0:
        penalties, penalty_metrics = penalties_of(trajectories, groups, config)
        success -= penalties
        metrics |= penalty_metrics
    ids = torch.tensor(groups, dtype=torch.int64)
    result = reflection_advantages(
        success,
        batch.segment_ids,
        batch.cu_seqlens,
        ids,
        lambda_exec=reward.lambda_exec,
        eta=eta_at(reward, step),
        tokens_per_cost=reward.tokens_per_cost,
        verifier_scores=values if reward.alpha is None else None,
        lambda_val=reward.lambda_val,
        **rule,
    )
    tokens = batch.cu_seqlens.diff()
    if reward.alpha is not None and values is not None:
        combined = result.advantages + reward.alpha * group_advantages(values, ids, **rule)
        spread = combined.repeat_interleave(tokens).masked_fill(~result.loss_mask, 0.0)
        result = result._replace(advantages=combined, token_advantages=spread)
    if options.step_weight > 0:
        steps = step_advantages(
            trajectories, result.rewards, groups, gamma=options.step_gamma, **rule
        )
        spread = spread_over_tokens(steps, trajectories, batch)
        result = result._replace(
            token_advantages=result.token_advantages + options.step_weight * spread
        )
        metrics["step_advantage/abs_mean"] = steps.abs().mean().item()
        metrics["step_advantage/compared"] = (steps != 0).float().mean().item()
    return result, metrics


def eta_at(reward: RewardConfig, step: int | None) -> float:
    """The weight of the reflection cost in an update."""
    if step is None or step >= reward.eta_warmup_steps:
        return reward.eta
    return reward.eta * step / reward.eta_warmup_steps


def penalties_of(
    trajectories: Sequence[Trajectory], groups: Sequence[int], config: TrainConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """What reflection and length take off every success [B], and their means over successes."""
    success = [t.success for t in trajectories]
    pairs = success_penalties(
        [t.reflection_tokens for t in trajectories],
        [t.trained_tokens for t in trajectories],
        success,
        groups,
        penalty=config.options.penalty,
        thresholds=config.options.penalty_thresholds,
    )
    taken = [pair for pair, won in zip(pairs, success, strict=True) if won]
    return torch.tensor([r + n for r, n in pairs]), {
        "penalty/reflection": mean(r for r, _ in taken),
        "penalty/length": mean(n for _, n in taken),
    }


class Choice(NamedTuple):
    """Indices of trajectories: ``kept`` by down-sampling, and ``used``, what is trained on."""

    kept: list[int]
    used: list[int]
    metrics: dict[str, float]


def choose(
    result: ReflectionAdvantages,
    batch: PackedBatch,
    groups: Sequence[int],
    config: TrainConfig,
    ranks: Ranks = ALONE,
) -> Choice:
    """Which trajectories an update trains on. ``groups``: ids, equal ones side by side.

    If no group of any process has an advantage all are used: what is left is the KL term.
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    live = _groups_with_advantage(result, batch, groups)
    metrics = {"groups/with_variance": len(live) / max(1, len(members))}
    keep = config.options.keep
    if keep is not None:
        advantages = result.advantages.tolist()
        for group, indices in members.items():
            subset = max_variance_subset([advantages[i] for i in indices], keep)
            members[group] = [indices[i] for i in subset]
    kept = [i for indices in members.values() for i in indices]
    if keep is not None:
        metrics["down_sampling/kept"] = len(kept) / max(1, len(groups))
    used = kept
    if ranks.any(bool(live)) and config.zero_variance != "keep":
        used = [i for i in kept if groups[i] in live]
    metrics["groups/skipped"] = len(members) - len({groups[i] for i in used})
    return Choice(kept, used, metrics)


def _groups_with_advantage(
    result: ReflectionAdvantages, batch: PackedBatch, groups: Sequence[int]
) -> set[int]:
    moved = F.pad((result.token_advantages != 0).cumsum(0), (1, 0))
    own = moved.index_select(0, batch.cu_seqlens.long()).diff() > 0
    return {group for group, moves in zip(groups, own.tolist(), strict=True) if moves}
