"""The bitmap font of page images: drawing text, and reading it back from pixels.

Pages use the monospaced bitmap font that ships with Pillow, black on white. Reading matches cells
of the page exactly against the glyphs of that font, so what is read is what is on the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from string import ascii_letters, digits

from PIL import Image, ImageDraw, ImageFont

CELL_WIDTH, CELL_HEIGHT = 7, 11
# "'" is missing because it is a raised ","; "?" because it stands for a glyph that is unreadable.
CHARACTERS = ascii_letters + digits + " " + '!"#$%&()*+,-./:;<=>@[\\]^_{|}~'
UNREADABLE = "?"
MAX_SPACES = 2  # wider gaps separate two lines that stand beside each other

Box = tuple[int, int, int, int]
_Cell = tuple[int, ...]  # one int a pixel row, the leftmost pixel in the highest bit


@dataclass(frozen=True)
class Glyph:
    """A character found on a page, with the box of its ink `(x0, y0, x1, y1)`, ends exclusive."""

    character: str
    x: int  # left edge of the cell
    ink: Box


@dataclass(frozen=True)
class Line:
    """Glyphs from left to right on one baseline."""

    glyphs: tuple[Glyph, ...]

    @property
    def text(self) -> str:
        first = self.glyphs[0]
        text = ""
        for glyph in self.glyphs:
            text = text.ljust((glyph.x - first.x) // CELL_WIDTH) + glyph.character
        return text

    @property
    def ink(self) -> Box:
        return _union(glyph.ink for glyph in self.glyphs)


def draw_page(size: tuple[int, int], lines: Iterable[tuple[int, int, str]]) -> Image.Image:
    """A white page `(width, height)`; each text begins at the top left corner `(x, y)`."""
    page = Image.new("1", size, 1)
    for x, y, text in lines:
        for column, character in enumerate(text):
            page.paste(_cell_image(character), (x + column * CELL_WIDTH, y))
    return page


def has_ink(page: Image.Image, box: Box) -> bool:
    """Whether a pixel of the box `(x0, y0, x1, y1)` of a two-valued page is black."""
    return page.crop(box).getextrema()[0] == 0


def read_page(page: Image.Image) -> list[Line]:
    """Every line of text on a two-valued page, from top to bottom and left to right.

    The topmost, leftmost pixel not read yet is the first pixel of some glyph. Each glyph that fits
    there is extended to both sides, cell by cell, and the one that explains most ink wins.
    """
    rows = _bit_rows(page)
    width, height = page.size
    unread = list(rows)
    lines = []
    for y in range(height):
        while unread[y]:
            x = width - unread[y].bit_length()
            candidates = [
                _extend(rows, width, x - dx, y - dy)
                for dx, dy in _first_pixels()
                if _cell(rows, width, x - dx, y - dy) in _characters()
            ]
            window = (x, y, min(x + CELL_WIDTH, width), min(y + CELL_HEIGHT, height))
            line = max(candidates, key=_ink_pixels, default=Line((Glyph(UNREADABLE, x, window),)))
            for x0, y0, x1, y1 in (glyph.ink for glyph in line.glyphs):
                keep = ~(((1 << (x1 - x0)) - 1) << (width - x1))
                for row in range(y0, y1):
                    unread[row] &= keep
            lines.append(line)
    return sorted(lines, key=lambda line: (line.ink[1], line.ink[0]))


def _extend(rows: list[int], width: int, x: int, y: int) -> Line:
    """The line around the glyph whose cell is at `(x, y)`."""
    glyphs = []
    for step in (-CELL_WIDTH, CELL_WIDTH):
        at, spaces = x, 0
        while spaces <= MAX_SPACES and -CELL_WIDTH < at < width:
            character = _characters().get(_cell(rows, width, at, y))
            if character:
                x0, y0, x1, y1 = _inks()[character]
                glyphs.append(Glyph(character, at, (at + x0, y + y0, at + x1, y + y1)))
                spaces = 0
            elif any(_cell(rows, width, at, y)):
                break
            else:
                spaces += 1
            at += step
    return Line(tuple(sorted(set(glyphs), key=lambda glyph: glyph.x)))


def _ink_pixels(line: Line) -> int:
    return sum(_pixels()[glyph.character] for glyph in line.glyphs)


def _bit_rows(page: Image.Image) -> list[int]:
    width, height = page.size
    stride = (width + 7) // 8
    data, white = page.tobytes(), (1 << width) - 1
    return [
        white & ~(int.from_bytes(data[row * stride : (row + 1) * stride], "big") >> (-width % 8))
        for row in range(height)
    ]


def _cell(rows: list[int], width: int, x: int, y: int) -> _Cell:
    shift, mask = width - x - CELL_WIDTH, (1 << CELL_WIDTH) - 1
    inside = (rows[row] if 0 <= row < len(rows) else 0 for row in range(y, y + CELL_HEIGHT))
    if shift < 0:
        return tuple((row << -shift) & mask for row in inside)
    return tuple((row >> shift) & mask for row in inside)


def _union(boxes: Iterable[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


@cache
def _cell_image(character: str) -> Image.Image:
    # Glyphs reach one pixel to the left of their advance width of six; the space in front, moved
    # off the image, keeps Pillow from clipping that pixel.
    cell = Image.new("1", (CELL_WIDTH, CELL_HEIGHT), 1)
    font = ImageFont.load_default_imagefont()
    ImageDraw.Draw(cell).text((-5, 0), f" {character}", font=font, fill=0)
    return cell


@cache
def _characters() -> dict[_Cell, str]:
    """Every visible character by the pixels of its cell."""
    visible = CHARACTERS.replace(" ", "")
    return {tuple(_bit_rows(_cell_image(character))): character for character in visible}


@cache
def _pixels() -> dict[str, int]:
    return {c: sum(bin(row).count("1") for row in cell) for cell, c in _characters().items()}


@cache
def _inks() -> dict[str, Box]:
    """Box of each character's ink inside its cell."""
    boxes = {}
    for cell, character in _characters().items():
        inked = [y for y, row in enumerate(cell) if row]
        columns = 0
        for row in cell:
            columns |= row
        x0 = CELL_WIDTH - columns.bit_length()
        x1 = CELL_WIDTH - (columns & -columns).bit_length() + 1
        boxes[character] = (x0, inked[0], x1, inked[-1] + 1)
    return boxes


@cache
def _first_pixels() -> set[tuple[int, int]]:
    """Where in its cell the leftmost pixel of a character's top row can be, as `(x, y)`."""
    tops = (next((y, row) for y, row in enumerate(cell) if row) for cell in _characters())
    return {(CELL_WIDTH - row.bit_length(), y) for y, row in tops}
