"""What the policy did, group by group, for ``regrpo report``: ``trajectories.jsonl`` of a run.

A line is a group of an update::

    {step, task: {id, family, question, expected}, error_type, context,
     trajectories: [{success, reward, advantage, segments: [{segment, tokens, text}]}]}

``context`` is the text that the group starts from, stored once; ``error_type`` names a forced
failure in it; ``segments`` are what follows, cut where the segment changes.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrpo.images import gathered
from regrpo.rollout import Trajectory
from regrpo.trainer import Run
from regrpo_kernels import ReflectionAdvantages, Segment

FILE = "trajectories.jsonl"


class TrajectoryLog:
    """Appends ``groups`` groups of every ``every``-th update (0: of none) to a run's log."""

    def __init__(self, training: Run, every: int, groups: int):
        self.training = training
        self.every = every
        self.groups = groups

    def write(
        self,
        trajectories: Sequence[Trajectory],
        result: ReflectionAdvantages,
        group_ids: Sequence[int],
    ) -> None:
        """``group_ids``: of each trajectory; those of a group are consecutive."""
        step = self.training.step
        if not self.every or step % self.every:
            return
        rewards, advantages = result.rewards.tolist(), result.advantages.tolist()
        groups = [
            list(members)
            for _, members in itertools.groupby(range(len(trajectories)), group_ids.__getitem__)
        ]
        # Some at random, those that teach something first.
        random.Random(step).shuffle(groups)
        groups.sort(key=lambda group: not any(advantages[i] for i in group))
        for group in groups[: self.groups]:
            members = [
                {
                    "success": trajectories[i].success,
                    "reward": rewards[i],
                    "advantage": advantages[i],
                    "segments": segments_of(trajectories[i], self.training.tokenizer),
                }
                for i in group
            ]
            start = trajectories[group[0]].start
            self.training.append(
                FILE,
                {
                    "step": step,
                    "task": {
                        "id": start.task.id,
                        "family": start.task.family,
                        "question": start.task.question,
                        "expected": start.task.answer,
                    },
                    "error_type": start.error_type,
                    "context": shared_context(members),
                    "trajectories": members,
                },
            )


def segments_of(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The text of a trajectory, cut where the segment changes."""
    ids, kinds = trajectory.tokens.input_ids, trajectory.tokens.segment_ids
    segments = []
    for kind, members in itertools.groupby(range(len(ids)), kinds.__getitem__):
        piece = [ids[i] for i in members]
        segments.append(
            {
                "segment": Segment(kind).name.lower(),
                "tokens": len(piece),
                "text": tokenizer.decode(
                    gathered(piece, trajectory.tokens.images), clean_up_tokenization_spaces=False
                ),
            }
        )
    return segments


def shared_context(members: Sequence[dict[str, Any]]) -> str:
    """Takes the segment that all members begin with out of them and returns its text."""
    first = members[0]["segments"][0]
    if any(member["segments"][0] != first for member in members):
        return ""
    for member in members:
        del member["segments"][0]
    return str(first["text"])
