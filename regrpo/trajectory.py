"""Where trajectories start. Pure Python: the data engine builds these without torch."""

from dataclasses import dataclass
from enum import Enum

from regrpo.tasks import Task

Message = dict[str, str]  # {"role": ..., "content": ...}


class End(str, Enum):
    """Why a trajectory ended; the values complete "it ended because ..."."""

    ANSWER = "it gave an answer"
    STEP = "its one step was done"
    FAILURE = "the correction of a failed call did not work either"
    MAX_STEPS = "it had used up its steps"
    CONTEXT = "its context was full"


@dataclass(frozen=True)
class Start:
    """A state from which the policy acts.

    Attributes:
        messages: the conversation so far; it ends with a user turn.
        step: index of the step to take.
        expected: what the reference call at ``step`` observes (local trajectories), as
            ``Observation.identity``.
        failed: the conversation ends in a forced failure, so the next turn is the correction.
        error_type: of that failure.
        confidences: the policy's in the first calls of the steps before (`regrpo.trigger`); without
            them only failures fire the trigger here.
        demonstration: executed turns that go on from here and end in the right call; empty where
            there are none.
        images: files, PNG or another format that Pillow reads; number n is what the messages call
            ``<image_0n>``.
    """

    task: Task
    messages: tuple[Message, ...]
    step: int = 0
    expected: str = ""
    failed: bool = False
    error_type: str | None = None
    confidences: tuple[float, ...] = ()
    demonstration: tuple[Message, ...] = ()
    images: tuple[bytes, ...] = ()
