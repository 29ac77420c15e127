"""`crop`: a part of an image, as an image."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from regrpo.image_files import to_png
from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.page import MAX_PIXELS, NamedBytes
from regrpo.tools.parameters import Coordinate, PathText
from regrpo.tools.paths import path_failure, read_inside

Box = tuple[int, int, int, int]


class CutError(ValueError):
    """A box whose edge goes through ink."""


def crop(
    root: Path, page: PathText, x0: Coordinate, y0: Coordinate, x1: Coordinate, y1: Coordinate
) -> Observation:
    """See the pixels x0 <= x < x1, y0 <= y < y1 of an image, whose dark pixels are ink.

    A box without any ink is an empty observation, and one whose edge cuts through ink an error;
    both show the whole image instead, to look where the ink is.
    """
    try:
        data = read_inside(root, page)
    except (OSError, ValueError) as error:
        return path_failure(root, page, error)
    box = (x0, y0, x1, y1)
    try:
        with Image.open(NamedBytes(data, page)) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{page} has {file.width} x {file.height} pixels")
            whole = file.convert("RGB")
        _require_inside(box, whole.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return failure(error)
    ink = whole.convert("L").point(lambda level: 255 if level < 128 else 0)
    where = f"{list(box)} of {whole.width} x {whole.height} pixels"
    if ink.crop(box).getbbox() is None:
        return Observation(f"(no ink in {where})", Status.EMPTY, to_png(whole))
    edges = [name for name, line in _edges(box).items() if _crosses(ink, *line)]
    if edges:
        cut = CutError(f"ink crosses the {' and '.join(edges)} of {where}")
        return Observation(failure(cut).text, Status.ERROR, to_png(whole))
    return Observation(f"part of {page}", Status.OK, to_png(whole.crop(box)))


def _require_inside(box: Box, size: tuple[int, int]) -> None:
    x0, y0, x1, y1 = box
    width, height = size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"box {list(box)} must have 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height; "
            f"page size is {width} x {height}"
        )


def _edges(box: Box) -> dict[str, tuple[Box, Box]]:
    """The lines of pixels inside and outside of each edge."""
    x0, y0, x1, y1 = box
    return {
        "left": ((x0, y0, x0 + 1, y1), (x0 - 1, y0, x0, y1)),
        "top": ((x0, y0, x1, y0 + 1), (x0, y0 - 1, x1, y0)),
        "right": ((x1 - 1, y0, x1, y1), (x1, y0, x1 + 1, y1)),
        "bottom": ((x0, y1 - 1, x1, y1), (x0, y1, x1, y1 + 1)),
    }


def _crosses(ink: Image.Image, inside: Box, outside: Box) -> bool:
    """Whether an inked pixel of one line touches one of the other, also at a corner; beyond the
    image there is none."""
    ours, theirs = (ink.crop(line).tobytes() for line in (inside, outside))
    return any(a and any(theirs[max(0, i - 1) : i + 2]) for i, a in enumerate(ours))
