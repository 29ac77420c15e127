"""Dynamic sampling: groups whose outcomes are all the same get new states.

"DAPO: An Open-Source LLM Reinforcement Learning System at Scale" (arXiv 2503.14476, section 3.2)
draws until every group holds

    0 < |{i : trajectory i succeeds}| < K

Here a collapsed group is replaced by one that is not, in at most ``rounds`` further draws. The
states of a round are a function of configuration, step and round, so a resumed run agrees.
"""

from collections.abc import Callable, Sequence

from regrpo.rollout import Trajectory

Group = list[Trajectory]


def collapsed(group: Sequence[Trajectory]) -> bool:
    """Whether all succeed or all fail."""
    return len({t.success for t in group}) < 2


def resample(
    groups: Sequence[Group], draw: Callable[[int, int], Sequence[Group]], rounds: int
) -> tuple[list[Group], dict[str, float]]:
    """Groups with the collapsed ones replaced where that succeeded, and metrics.

    Args:
        draw: ``draw(round, count)`` samples ``count`` groups of new states; rounds count from 1.
    """
    groups = list(groups)
    drawn = [t for group in groups for t in group]
    replaced = used = 0
    for number in range(1, rounds + 1):
        dead = [i for i, group in enumerate(groups) if collapsed(group)]
        if not dead:
            break
        used = number
        fresh = draw(number, len(dead))
        drawn += [t for group in fresh for t in group]
        for i, group in zip(dead, [g for g in fresh if not collapsed(g)], strict=False):
            groups[i] = group
            replaced += 1
    return groups, {
        "groups/resampled": replaced,
        "groups/resample_rounds": used,
        "sampled/trajectories": len(drawn),
        # What the groups of the update say is biased: they were chosen.
        "sampled/success": sum(t.success for t in drawn) / len(drawn),
    }
