"""Episodes and local trajectories: the policy acts, tools execute, failures open a reflection.

A *local trajectory* is one step from a given state: ``a0 -> o0``, and if the trigger fires ``z, a1
-> o1``, all of it in the context. An *episode* is a whole task. Both run here, many at a time, turn
by turn: one batched generation, one batched execution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from regrpo.config import TriggerConfig
from regrpo.environment import Environment
from regrpo.images import read_images
from regrpo.modeling import CausalLM
from regrpo.prompts import REFLECTION_OPENER, observation_turn, opening
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat, TokenizedTrajectory
from regrpo.tasks import Task, task_images
from regrpo.tool_calls import ToolCallError, parse_turn
from regrpo.tools import Observation, Status
from regrpo.trajectory import End, Message, Start
from regrpo.trigger import Clause, confidence, fired
from regrpo_kernels import Segment


class Session(Protocol):
    """Trajectories that a policy continues, turn by turn."""

    def generate(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Sample]:
        """One turn for every prompt.

        Args:
            prompts: all tokens of each trajectory so far. Behind the first turn: its former prompt,
                the sampled turn, and at least a token more.
            numbers: which trajectories these are. The first call names all of them; those that a
                later call leaves out have ended.
        """
        ...


class Policy(Protocol):
    """What a rollout asks of a model: continue prompts."""

    chat: ChatFormat

    def session(self) -> Session:
        """For trajectories that begin now."""
        ...


class LearningPolicy(Policy, Protocol):
    """The policy of a model that is trained between rollouts."""

    model: CausalLM

    def renew(self, seed: int) -> None:
        """What is sampled from here on is that of the model now, and a function of the seed."""
        ...


@dataclass(frozen=True)
class TurnRecord:
    """One executed turn.

    Attributes:
        correction: it is the second call of its step, behind one that fired the trigger.
        confidence: the policy's in the thought and the call, see `regrpo.trigger`.
        fired: the clause that makes the next turn a correction.
    """

    step: int
    text: str
    observation: Observation
    correction: bool
    reflection_tokens: int
    confidence: float | None = None
    fired: Clause | None = None


@dataclass
class Trajectory:
    """A finished local trajectory or episode, as tokens and as turns.

    ``origin``: "policy", or what joined a group afterwards: "replay" or "refinement".
    ``failed``: the trigger has fired, so the next turn is a correction. ``confidences`` are those
    of the steps' first calls so far.
    """

    start: Start
    tokens: TokenizedTrajectory = field(default_factory=TokenizedTrajectory)
    turns: list[TurnRecord] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    step: int = 0
    failed: bool = False
    done: bool = False
    success: bool = False
    answer: str | None = None
    end: End | None = None
    origin: str = "policy"

    @property
    def reflection_tokens(self) -> int:
        """Tokens of its reflections."""
        return self.tokens.count(Segment.REFLECTION)

    @property
    def trained_tokens(self) -> int:
        """Tokens of its calls and reflections."""
        return self.tokens.count(Segment.ACTION) + self.reflection_tokens


def task_start(task: Task) -> Start:
    """Where an episode of a task begins."""
    messages = opening(task.question, images=task.num_images)
    return Start(task, tuple(messages), images=task_images(task))


def conversation(
    start: Start, turns: Sequence[TurnRecord], *, sees: bool
) -> tuple[tuple[Message, ...], tuple[bytes, ...]]:
    """Messages and images behind some turns of a trajectory; ``sees``: images are shown."""
    messages, images = list(start.messages), list(start.images)
    for turn in turns:
        image = turn.observation.image if sees else None
        number = None if image is None else len(images)
        content = observation_turn(turn.step, turn.observation.text, number)
        messages.append({"role": "assistant", "content": turn.text})
        messages.append({"role": "user", "content": content})
        images += [] if image is None else [image]
    return tuple(messages), tuple(images)


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
    trigger: TriggerConfig | None = None,
    max_length: int | None = None,
    on_turn: Callable[[Trajectory], object] | None = None,
) -> list[Trajectory]:
    """Runs one trajectory from every start.

    Args:
        reflect: open a reflection block when the trigger fires; at most one a step.
        whole: go on until ``final_answer``, a correction of a failure that fails, or ``max_steps``;
            otherwise stop after a step. A correction of a call that worked may fail: the episode
            goes on with what that call observed.
        trigger: what fires it, beside a typed failure (``Status.ERROR`` or ``EMPTY``); None for
            nothing else.
        max_length: tokens of a context, at most; one without room for a token more ends.
        on_turn: called after every turn, which is the trajectory's last.

    Success is judged by execution: an episode's final answer is the task's; a local trajectory's
    last observation is that of the reference call.
    """
    trigger = TriggerConfig() if trigger is None else trigger
    trigger.require_reflect(reflect)
    opener = policy.chat.encode(REFLECTION_OPENER) if reflect else []
    trajectories = []
    for start in starts:
        trajectory = Trajectory(
            start, confidences=list(start.confidences), step=start.step, failed=start.failed
        )
        images = read_images(policy.chat.reader, start.images)
        prompt = policy.chat.prompt(start.messages, images)
        trajectory.tokens.extend(prompt, Segment.CONTEXT, images=[*images.values()])
        trajectories.append(trajectory)
    session = policy.session()
    while True:
        active = [t for t in trajectories if not t.done]
        for t in active:
            if t.failed:
                # The opener is written by the trigger, not by the policy: it is not trained.
                t.tokens.extend(opener, Segment.CONTEXT)
            if max_length is not None and len(t.tokens) >= max_length:
                t.done, t.end = True, End.CONTEXT
        numbers = [i for i, t in enumerate(trajectories) if not t.done]
        if not numbers:
            return trajectories
        active = [trajectories[i] for i in numbers]
        generated = session.generate([t.tokens.input_ids for t in active], numbers)
        texts = []
        for t, turn in zip(active, generated, strict=True):
            forced = REFLECTION_OPENER if t.failed and reflect else ""
            text, kinds = policy.chat.segment(turn.ids, forced)
            t.tokens.input_ids.extend(turn.ids)
            t.tokens.segment_ids.extend(kinds)
            t.tokens.log_probs.extend(turn.log_probs)
            acted = zip(kinds, turn.log_probs, strict=True)
            certainty = confidence([value for kind, value in acted if kind == Segment.ACTION])
            texts.append((text, kinds.count(int(Segment.REFLECTION)), certainty))
        observations = environment.execute(
            [(t.start.task.workspace, text) for t, (text, *_) in zip(active, texts, strict=True)]
        )
        for t, (text, count, certainty), observation in zip(
            active, texts, observations, strict=True
        ):
            clause = None
            if not t.failed:  # at most one block a step
                doubted = None if _is_final(text) else certainty
                clause = fired(observation.status, doubted, t.confidences, trigger)
                if certainty is not None:
                    t.confidences.append(certainty)
            t.turns.append(
                TurnRecord(t.step, text, observation, t.failed, count, certainty, clause)
            )
            _advance(t, text, observation, whole, max_steps)
            if on_turn is not None:
                on_turn(t)
            if not t.done:
                if t.tokens.input_ids[-1] != policy.chat.end_id:  # the turn ran into its limit
                    t.tokens.extend([policy.chat.end_id], Segment.CONTEXT)
                _observe(t, policy.chat)


def _observe(t: Trajectory, chat: ChatFormat) -> None:
    """Appends the last turn's observation, with its image if the model sees images."""
    turn = t.turns[-1]
    new = [] if turn.observation.image is None or chat.reader is None else [turn.observation.image]
    number = len(t.start.images) + sum(r.observation.image is not None for r in t.turns[:-1])
    images = read_images(chat.reader, new, number)
    content = observation_turn(turn.step, turn.observation.text, number if new else None)
    tokens = chat.observation(content, images)
    t.tokens.extend(tokens, Segment.OBSERVATION, images=[*images.values()])


def _advance(
    t: Trajectory, text: str, observation: Observation, whole: bool, max_steps: int
) -> None:
    """Moves a trajectory on after an observation."""
    task = t.start.task
    if t.turns[-1].fired is not None:
        t.failed = True
        return
    works = observation.status is Status.OK
    doubted = len(t.turns) > 1 and t.turns[-2].fired is Clause.CONFIDENCE
    if not works and not (doubted and whole):  # a correction that fails
        t.done, t.end = True, End.FAILURE
        return
    t.failed = False
    final = works and _is_final(text)
    if final or not whole:
        t.done, t.end = True, End.ANSWER if final else End.STEP
        t.answer = observation.text if final else None
        expected = task.answer if final else t.start.expected
        seen = observation.identity
        # A premature final answer is no success of a step that should have called a tool.
        step_is_final = whole or task.steps[t.start.step].call.name == "final_answer"
        t.success = same_answer(seen, expected) and final == step_is_final
        return
    t.step += 1
    if t.step >= max_steps:
        t.done, t.end = True, End.MAX_STEPS


def _is_final(text: str) -> bool:
    try:
        return parse_turn(text).call.name == "final_answer"
    except ToolCallError:
        return False
