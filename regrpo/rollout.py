"""Episodes and local trajectories: the policy acts, tools execute, failures open a reflection.

A *local trajectory* is one step from a given state: ``a0 -> o0``, and after a failure ``z, a1 ->
o1``. An *episode* is a whole task. Both run here, many at a time, turn by turn: one batched
generation, one batched execution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from regrpo.environment import Environment
from regrpo.prompts import REFLECTION_OPENER, observation_turn, opening
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat, TokenizedTrajectory
from regrpo.tasks import Task
from regrpo.tool_calls import ToolCallError, parse_turn
from regrpo.tools import Observation, Status
from regrpo.trajectory import Start
from regrpo_kernels import Segment


class Policy(Protocol):
    """What a rollout asks of a model: continue prompts."""

    chat: ChatFormat

    def generate(self, prompts: Sequence[Sequence[int]]) -> list[Sample]:
        """One turn for every prompt."""
        ...


@dataclass(frozen=True)
class TurnRecord:
    """One executed turn. ``correction``: it follows a failure of the same step."""

    step: int
    text: str
    observation: Observation
    correction: bool
    reflection_tokens: int


@dataclass
class Trajectory:
    """A finished local trajectory or episode, as tokens and as turns.

    ``origin``: "policy", or what joined a group afterwards: "replay" or "refinement".
    """

    start: Start
    tokens: TokenizedTrajectory = field(default_factory=TokenizedTrajectory)
    turns: list[TurnRecord] = field(default_factory=list)
    step: int = 0
    failed: bool = False
    done: bool = False
    success: bool = False
    answer: str | None = None
    origin: str = "policy"

    @property
    def reflection_tokens(self) -> int:
        return self.tokens.count(Segment.REFLECTION)

    @property
    def trained_tokens(self) -> int:
        return self.tokens.count(Segment.ACTION) + self.reflection_tokens


def task_start(task: Task) -> Start:
    return Start(task, tuple(opening(task.question)))


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are the same up to case and outer white space."""
    return given.strip().casefold() == expected.strip().casefold()


def run(
    policy: Policy,
    environment: Environment,
    starts: Sequence[Start],
    *,
    reflect: bool,
    whole: bool,
    max_steps: int = 6,
) -> list[Trajectory]:
    """Runs one trajectory from every start.

    Args:
        reflect: open a reflection block after a typed failure (``Status.ERROR`` or ``EMPTY``); at
            most one a step.
        whole: go on until ``final_answer``, a correction that fails, or ``max_steps``; otherwise
            stop after a step.

    Success is judged by execution: an episode's final answer is the task's; a local trajectory's
    last observation is that of the reference call.
    """
    opener = policy.chat.encode(REFLECTION_OPENER) if reflect else []
    trajectories = []
    for start in starts:
        trajectory = Trajectory(start, step=start.step, failed=start.failed)
        trajectory.tokens.extend(policy.chat.prompt(start.messages), Segment.CONTEXT)
        trajectories.append(trajectory)
    active = trajectories
    while active:
        for t in active:
            if t.failed:
                # The opener is written by the trigger, not by the policy: it is not trained.
                t.tokens.extend(opener, Segment.CONTEXT)
        generated = policy.generate([t.tokens.input_ids for t in active])
        texts = []
        for t, turn in zip(active, generated, strict=True):
            forced = REFLECTION_OPENER if t.failed and reflect else ""
            text, kinds = policy.chat.segment(turn.ids, forced)
            t.tokens.input_ids.extend(turn.ids)
            t.tokens.segment_ids.extend(kinds)
            t.tokens.log_probs.extend(turn.log_probs)
            texts.append((text, kinds.count(int(Segment.REFLECTION))))
        observations = environment.execute(
            [(t.start.task.workspace, text) for t, (text, _) in zip(active, texts, strict=True)]
        )
        for t, (text, count), observation in zip(active, texts, observations, strict=True):
            t.turns.append(TurnRecord(t.step, text, observation, t.failed, count))
            _advance(t, text, observation, whole, max_steps)
            if not t.done:
                if t.tokens.input_ids[-1] != policy.chat.end_id:  # the turn ran into its limit
                    t.tokens.extend([policy.chat.end_id], Segment.CONTEXT)
                content = observation_turn(t.turns[-1].step, observation.text)
                t.tokens.extend(policy.chat.observation(content), Segment.OBSERVATION)
        active = [t for t in active if not t.done]
    return trajectories


def _advance(
    t: Trajectory, text: str, observation: Observation, whole: bool, max_steps: int
) -> None:
    """Moves a trajectory on after an observation."""
    task = t.start.task
    if observation.status is not Status.OK:
        t.done = t.failed
        t.failed = True
        return
    t.failed = False
    final = _is_final(text)
    if final or not whole:
        t.done = True
        t.answer = observation.text if final else None
        expected = task.answer if final else t.start.expected
        # A premature final answer is no success of a step that should have called a tool.
        step_is_final = whole or task.steps[t.start.step].call.name == "final_answer"
        t.success = same_answer(observation.text, expected) and final == step_is_final
        return
    t.step += 1
    t.done = t.step >= max_steps


def _is_final(text: str) -> bool:
    try:
        return parse_turn(text).call.name == "final_answer"
    except ToolCallError:
        return False
