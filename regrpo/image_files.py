"""Image files, and how messages name them."""

import base64
import io
import re
from pathlib import Path

from PIL import Image

MAX_PIXELS = 50_000_000
PLACEHOLDER = re.compile(r"<image_\d+>")


def placeholder(index: int) -> str:
    """How messages name image ``index`` of their conversation."""
    return f"<image_{index:02d}>"


def without_placeholders(text: str) -> str:
    """``text`` with a zero-width space in what would name an image: what tools say is text only."""
    return PLACEHOLDER.sub(lambda found: f"<\u200b{found[0][1:]}", text)


def data_url(data: bytes) -> str:
    """An image file as endpoints of chat models take it.

    Raises:
        ValueError: it is no image.
    """
    with opened(data) as file:
        kind = Image.MIME[file.format or "PNG"]
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def to_png(image: Image.Image) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def readable_image(path: Path) -> bytes | None:
    """The bytes of a file that holds an image; None for any other."""
    try:
        data = path.read_bytes()
        opened(data).close()
    except (OSError, ValueError):
        return None
    return data


def opened(data: bytes) -> Image.Image:
    """Raises ValueError for what is no image, or a larger one than ``MAX_PIXELS``."""
    try:
        file = Image.open(io.BytesIO(data))
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels, over {MAX_PIXELS}")
        file.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{error}") from error
    return file
