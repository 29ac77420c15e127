"""Where trajectories start. Pure Python: the data engine builds these without torch."""

from dataclasses import dataclass

from regrpo.tasks import Task

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Start:
    """A state from which the policy acts.

    Attributes:
        messages: the conversation so far; it ends with a user turn.
        step: index of the step to take.
        expected: the observation of the reference call at ``step`` (local trajectories).
        failed: the conversation ends in a forced failure, so the next turn is the correction.
        error_type: of that failure.
        demonstration: executed turns that go on from here and end in the right call; empty where
            there are none.
    """

    task: Task
    messages: tuple[Message, ...]
    step: int = 0
    expected: str = ""
    failed: bool = False
    error_type: str | None = None
    demonstration: tuple[Message, ...] = ()
