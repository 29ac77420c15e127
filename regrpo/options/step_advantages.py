"""Step-level advantages: turns in the same anchor state are compared with each other.

"Group-in-Group Policy Optimization for LLM Agent Training" (GiGPO, arXiv 2505.10978):

    A = A_E + omega A_S,    R_k = gamma^(n - k) R

A_E is the advantage of the whole trajectory in its group. A_S is that of the discounted return R_k
of turn k (of n; the reward R comes at the end) among all turns of the group in the same anchor
state: the same step, first try or correction, behind the same observation. A turn that is alone in
its state has A_S = 0.
"""

from collections.abc import Sequence
from typing import Any

import torch

from regrpo.packing import PackedBatch
from regrpo.rollout import Trajectory
from regrpo_kernels import group_advantages


def anchor_states(trajectories: Sequence[Trajectory], groups: Sequence[int]) -> list[int]:
    """An id for every turn of every trajectory; the same in the same state of the same group."""
    ids: dict[tuple[object, ...], int] = {}
    states = []
    for t, group in zip(trajectories, groups, strict=True):
        seen = ""  # of the conversation so far, which a group shares
        for turn in t.turns:
            state = (group, turn.step, turn.correction, seen)
            states.append(ids.setdefault(state, len(ids)))
            seen = turn.observation.identity
    return states


def step_advantages(
    trajectories: Sequence[Trajectory],
    rewards: torch.Tensor,
    groups: Sequence[int],
    *,
    gamma: float,
    **rule: Any,
) -> torch.Tensor:
    """A_S of every turn of every trajectory, in order, fp32.

    Args:
        rewards: [B] of the trajectories.
        groups: of the trajectories.
        rule: baseline, scale, min_std and clip of ``group_advantages``.
    """
    returns = [
        reward * gamma ** (len(t.turns) - 1 - k)
        for t, reward in zip(trajectories, rewards.tolist(), strict=True)
        for k in range(len(t.turns))
    ]
    states = torch.tensor(anchor_states(trajectories, groups))
    return group_advantages(torch.tensor(returns), states, **rule)


def spread_over_tokens(
    values: torch.Tensor, trajectories: Sequence[Trajectory], batch: PackedBatch
) -> torch.Tensor:
    """A value a turn -> fp32 [T], on the turn's trained tokens; 0 elsewhere.

    A turn's trained tokens are a run; runs of two turns never touch. Of a refinement only the last
    turn is trained.

    Raises:
        ValueError: a trajectory has not one run a turn that is trained.
    """
    before = torch.roll(batch.loss_mask, 1)
    before[:1] = False
    starts = batch.loss_mask & ~before
    run = starts.cumsum(0)
    bounds = torch.nn.functional.pad(run, (1, 0)).index_select(0, batch.cu_seqlens.long())
    turns = 0
    trained: list[int] = []  # places of turns that have a run
    for index, (runs, t) in enumerate(zip(bounds.diff().tolist(), trajectories, strict=True)):
        turns += len(t.turns)
        expected = 1 if t.origin == "refinement" else len(t.turns)
        if runs != expected:
            raise ValueError(
                f"trajectory {index} has {runs} runs of trained tokens and {len(t.turns)} turns; "
                f"expected {expected} runs"
            )
        trained += range(turns - runs, turns)
    of_runs = values.index_select(0, torch.tensor(trained, dtype=torch.int64))
    spread = of_runs.index_select(0, (run - 1).clamp(min=0))
    return spread.masked_fill(~batch.loss_mask, 0.0)
