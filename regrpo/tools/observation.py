"""What a tool gives back."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from enum import Enum

from PIL import Image, ImageChops


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

    @property
    def identity(self) -> str:
        """The text; with a picture also what is seen on it, wherever the picture's edges are."""
        return self.text if self.image is None else f"{self.text}\n{_picture(self.image)}"


def _picture(data: bytes) -> str:
    """Size and digest of what differs from white, by its smallest box."""
    with Image.open(io.BytesIO(data)) as file:
        grey = file.convert("L")
    seen = grey.crop(ImageChops.invert(grey).getbbox())
    digest = hashlib.blake2b(seen.tobytes(), digest_size=8).hexdigest()
    return f"{seen.width} x {seen.height} {digest}"


def failure(error: BaseException, hint: str = "") -> Observation:
    """An exception as an observation: class name and message, then a hint for the repair."""
    # SyntaxError adds "(<unknown>, line 1)" to its text, which says nothing about the call.
    message = error.msg if isinstance(error, SyntaxError) else error
    text = f"{type(error).__name__}: {message}"
    return Observation(f"{text}\n{hint}" if hint else text, Status.ERROR)
