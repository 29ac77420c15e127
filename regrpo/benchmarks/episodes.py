"""Many episodes at a time: the model speaks, tools answer, until each has come to its end.

The prompts and the layout of turns are those of training. When a call fails, the next turn is a
correction: a model in this process finds the reflection opened, one behind an endpoint is told of
reflections by its system prompt alone.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from regrpo.prompts import observation_turn
from regrpo.tool_calls import ToolCall, ToolCallError, parse_turn, reflection_span
from regrpo.tools import Observation, Status, call_tool
from regrpo.tools.observation import failure
from regrpo.trajectory import End, Message

Entry = dict[str, Any]


class Refused(str):
    """Why a model did not continue a conversation, in place of its turn."""


class ChatModel(Protocol):
    """What can continue conversations."""

    def replies(
        self,
        conversations: Sequence[Sequence[Message]],
        reflecting: Sequence[bool],
        images: Sequence[Sequence[bytes]],
    ) -> list[str]:
        """One turn for each, or a `Refused`.

        Args:
            reflecting: the last call failed, so the turn opens with a reflection.
            images: of each conversation, by the numbers of their placeholders.
        """
        ...


@dataclass
class Episode:
    """A conversation to go on from.

    Attributes:
        execute: gives the observation of a call that is not ``final_answer``; None ends the
            episode with its first turn, of which nothing is executed.
        turns: what happened, as JSON.
        images: files that the messages call by number, to which those of observations are added;
            None shows none.
    """

    key: str
    messages: list[Message]
    execute: Callable[[ToolCall], Observation] | None
    max_steps: int
    turns: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    answer: str | None = None
    end: str | None = None
    images: list[bytes] | None = None

    def entry(self) -> Entry:
        return {"key": self.key, "turns": self.turns, "answer": self.answer, "end": self.end}


def run_episodes(
    model: ChatModel,
    episodes: Iterable[Episode],
    *,
    concurrency: int,
    reflect: bool,
    on_end: Callable[[Entry], object],
) -> None:
    """Runs all, ``concurrency`` of them at a time; ``on_end`` gets each as soon as it ends."""
    waiting = iter(episodes)
    active: list[Episode] = []
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            active += islice(waiting, concurrency - len(active))
            if not active:
                return
            texts = model.replies(
                [e.messages for e in active],
                [reflect and e.failed for e in active],
                [e.images or () for e in active],
            )
            list(pool.map(_advance, active, texts))
            for episode in active:
                if episode.end is not None:
                    on_end(episode.entry())
            active = [e for e in active if e.end is None]


def _advance(episode: Episode, text: str) -> None:
    if isinstance(text, Refused):
        episode.end = str(text)
        return
    step = len(episode.turns)
    turn: dict[str, Any] = {"text": text, "reflected": reflection_span(text) is not None}
    episode.turns.append(turn)
    if episode.execute is None:
        episode.end = End.STEP.value
        return
    observation, final = _observe(episode.execute, text)
    turn |= {"observation": observation.text, "status": observation.status.value}
    if final and observation.status is Status.OK:
        episode.answer, episode.end = observation.text, End.ANSWER.value
    elif len(episode.turns) >= episode.max_steps:
        episode.end = End.MAX_STEPS.value
    # At most one reflection for a failure: a correction that fails is not corrected again.
    episode.failed = observation.status is not Status.OK and not episode.failed
    episode.messages.append({"role": "assistant", "content": text})
    number = None
    if episode.images is not None and observation.image is not None:
        number = len(episode.images)
        episode.images.append(observation.image)
    content = observation_turn(step, observation.text, number)
    episode.messages.append({"role": "user", "content": content})


def _observe(execute: Callable[[ToolCall], Observation], text: str) -> tuple[Observation, bool]:
    try:
        call = parse_turn(text).call
    except ToolCallError as error:
        return failure(SyntaxError(str(error))), False
    if call.name == "final_answer":
        return call_tool(Path(), call), True  # it touches no file
    return execute(call), False
