"""`read_region`: the text in a part of a page image, read from its pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from regrpo.tools.cache import LRU
from regrpo.tools.glyphs import UNREADABLE, Line, has_ink, read_page
from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.parameters import Coordinate, PathText
from regrpo.tools.paths import hashed_order, path_failure, read_inside

MAX_PIXELS = 4_000_000


@dataclass(frozen=True)
class _Page:
    image: Image.Image  # two-valued
    lines: list[Line]


_pages: LRU[bytes, _Page] = LRU(64)


class NamedBytes(io.BytesIO):
    """Bytes whose repr, which Pillow puts into its errors, is the path as the model gave it."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name = name

    def __repr__(self) -> str:
        return repr(self._name)


def read_region(
    root: Path, page: PathText, x0: Coordinate, y0: Coordinate, x1: Coordinate, y1: Coordinate
) -> Observation:
    """Read the text inside the pixels x0 <= x < x1, y0 <= y < y1 of a PNG page.

    A character that the region cuts reads `?`. Without any ink inside, the observation is empty
    and shows where on the page there is text.
    """
    try:
        data = read_inside(root, page)
    except (OSError, ValueError) as error:
        return path_failure(root, page, error)
    try:
        found = _pages.get(data, lambda: _decode(data, page))
        _pages.trim()
        return _read(found, (x0, y0, x1, y1))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return failure(error)


def _decode(data: bytes, name: str) -> _Page:
    with Image.open(NamedBytes(data, name), formats=("PNG",)) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"page has {file.width} x {file.height} pixels, over {MAX_PIXELS}")
        image = file.convert("L").point(lambda level: 255 if level >= 128 else 0).convert("1")
    return _Page(image, read_page(image))


def _read(page: _Page, region: tuple[int, int, int, int]) -> Observation:
    x0, y0, x1, y1 = region
    width, height = page.image.size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"region {list(region)} must have 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height; "
            f"page size is {width} x {height}"
        )
    if not has_ink(page.image, region):
        layout = (f"{line.text.split()[0]} {list(line.ink)}" for line in page.lines)
        return Observation("\n".join(["(empty region)", *hashed_order(layout)]), Status.EMPTY)
    return Observation("\n".join(_visible(page, region)), Status.OK)


def _visible(page: _Page, region: tuple[int, int, int, int]) -> list[str]:
    """What of each line lies in the region, a glyph without all of its ink as unreadable."""
    texts = []
    for line in page.lines:
        glyphs = []
        for glyph in line.glyphs:
            x0, y0, x1, y1 = glyph.ink
            part = (max(x0, region[0]), max(y0, region[1]), min(x1, region[2]), min(y1, region[3]))
            if part == glyph.ink:
                glyphs.append(glyph)
            elif part[0] < part[2] and part[1] < part[3] and has_ink(page.image, part):
                glyphs.append(replace(glyph, character=UNREADABLE))
        if glyphs:
            texts.append(Line(tuple(glyphs)).text)
    return texts
