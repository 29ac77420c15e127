"""DrawBox and AddText, as AgentLego draws: sizes and margins follow the image's height."""

import io
import re

from PIL import Image, ImageDraw, ImageFont

MAX_PIXELS = 50_000_000
MAX_TEXT = 5000
_POSITIONS = ("lt", "lm", "lb", "mt", "mm", "mb", "rt", "rm", "rb")


def open_image(data: bytes, name: str) -> Image.Image:
    """A decoded image. Raises ValueError, naming it, for what is none or is too large."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{name}' is no readable image: {error}") from error
    return image


def draw_box(image: Image.Image, bbox: str, annotation: str | None) -> Image.Image:
    """A translucent red box with its text above."""
    x1, y1, x2, y2 = _numbers(bbox, 4, "bbox")
    if x1 > x2 or y1 > y2:
        raise ValueError(f"bbox '{bbox}': expected (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2")
    below = image.convert("RGBA")
    above = Image.new("RGBA", below.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(above)
    pen.rectangle((x1, y1, x2, y2), fill=(255, 0, 0, 64), outline=(255, 0, 0, 255))
    if annotation:
        _write(pen, (x1, y1 - 5), annotation, (255, 0, 0, 255), "lb", below.height)
    return Image.alpha_composite(below, above).convert("RGB")


def add_text(image: Image.Image, text: str, position: str, color: str) -> Image.Image:
    """Text at a named position, a twentieth of the width from the edge, or with its left bottom
    corner at (x, y)."""
    copy = image.convert("RGB")
    width, height = copy.size
    margin = width // 20
    if position in _POSITIONS:
        xs = {"l": margin, "m": width // 2, "r": width - margin}
        ys = {"t": margin, "m": height // 2, "b": height - margin}
        at: tuple[float, float] = (xs[position[0]], ys[position[1]])
        anchor = position
    else:
        (x, y), anchor = _numbers(position, 2, "position"), "lb"
        at = (x, y)
    _write(ImageDraw.Draw(copy), at, text, color, anchor, height)
    return copy


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    color: str | tuple[int, ...],
    anchor: str,
    height: int,
) -> None:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{len(text)} characters of text; at most {MAX_TEXT}")
    font = ImageFont.load_default(size=max(1, height * 18 // 336))
    # Pillow anchors lines from above ("a", "m", "d"), and text with several lines by those alone.
    if "\n" in text:
        anchor = anchor[0] + {"t": "a", "m": "m", "b": "d"}[anchor[1]]
    pen.text(at, text, fill=color, font=font, anchor=anchor)


def _numbers(text: str, count: int, name: str) -> tuple[float, ...]:
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(found) != count or re.search(r"[^\d\s.,()\[\]-]", text):
        raise ValueError(f"{name} '{text:.60}': expected {count} numbers, such as (10, 20)")
    return tuple(map(float, found))
