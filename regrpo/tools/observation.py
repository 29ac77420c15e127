"""What a tool gives back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """How a call ended. The reflection trigger reads this, never the text."""

    OK = "ok"
    ERROR = "error"
    EMPTY = "empty"


@dataclass(frozen=True)
class Observation:
    """What is shown to the model, and how the call ended.

    ``image``: a PNG file that belongs to the text, for models that see images.
    """

    text: str
    status: Status
    image: bytes | None = None


def failure(error: BaseException, hint: str = "") -> Observation:
    """An exception as an observation: class name and message, then a hint for the repair."""
    # SyntaxError adds "(<unknown>, line 1)" to its text, which says nothing about the call.
    message = error.msg if isinstance(error, SyntaxError) else error
    text = f"{type(error).__name__}: {message}"
    return Observation(f"{text}\n{hint}" if hint else text, Status.ERROR)
