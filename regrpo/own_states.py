"""Local states from the policy's own episodes: its earlier turns and what they really observed.

States from data are those of a reference, or of a near-miss somebody thought of. Here the current
policy solves whole tasks first, and a turn of an episode becomes a state: also one right behind a
failure of its own.

The next turn of such a state can be judged where the episode is on the reference's track: every
step it has finished observed what one of the reference's steps observes, each of these once, in any
order. Then the first of the others is to come, and a trajectory succeeds if it observes what that
one does. Off the track nothing says what should come next; those turns are counted and left out.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from regrpo.config import TriggerConfig
from regrpo.environment import Environment
from regrpo.prompts import thought
from regrpo.rollout import Policy, Trajectory, conversation, run, same_answer, task_start
from regrpo.tool_calls import Turn
from regrpo.tools import Status
from regrpo.trajectory import Start


@dataclass(frozen=True)
class OwnStates:
    """One state for each task, and how many of the episodes' turns were off the track."""

    starts: list[Start]
    turns: int
    off_track: int


def own_states(
    policy: Policy,
    environment: Environment,
    states: Sequence[Start],
    rng: random.Random,
    *,
    reflect: bool,
    max_steps: int,
    trigger: TriggerConfig,
) -> OwnStates:
    """Runs an episode of the task of every state; a turn of it, drawn by ``rng``, is the new state.

    Whatever comes of an episode, its first turn is a state: the task as it was asked.
    """
    tasks = [state.task for state in states]
    episodes = run(
        policy,
        environment,
        [task_start(task) for task in tasks],
        reflect=reflect,
        whole=True,
        max_steps=max_steps,
        trigger=trigger,
    )
    calls = [(task.workspace, step.call) for task in tasks for step in task.steps]
    observed = iter(
        environment.execute(
            [(files, Turn(None, thought(call.name), call).render()) for files, call in calls]
        )
    )
    starts, turns, off_track = [], 0, 0
    for task, episode in zip(tasks, episodes, strict=True):
        reference = [next(observed).identity for _ in task.steps]
        found = states_of(episode, reference, sees=policy.chat.reader is not None)
        starts.append(rng.choice(found))
        turns += len(episode.turns)
        off_track += len(episode.turns) - len(found)
    return OwnStates(starts, turns, off_track)


def states_of(episode: Trajectory, reference: Sequence[str], *, sees: bool = False) -> list[Start]:
    """The states before those turns of an episode that are on the track.

    Args:
        reference: what the reference call of each step of the task observes.
        sees: the policy was shown the images that calls observed.
    """
    finished: dict[int, str] = {}  # step -> what its last call that worked observed
    states = []
    for index, turn in enumerate(episode.turns):
        left = _left(reference, [text for step, text in finished.items() if step < turn.step])
        if left:
            messages, images = conversation(episode.start, episode.turns[:index], sees=sees)
            states.append(
                Start(
                    episode.start.task,
                    messages,
                    step=turn.step,
                    expected=left[0],
                    failed=turn.correction,
                    images=images,
                )
            )
        if turn.observation.status is Status.OK:
            finished[turn.step] = turn.observation.identity
    return states


def _left(reference: Sequence[str], finished: Sequence[str]) -> list[str]:
    """What of the reference is to come; nothing where a finished step is none of its steps."""
    left = list(reference)
    for text in finished:
        match = next((i for i, expected in enumerate(left) if same_answer(text, expected)), None)
        if match is None:
            return []
        del left[match]
    return left
