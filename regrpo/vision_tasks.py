"""Tasks over page images that only looking at them solves.

``scan``: rows of a label and a number stand about a page; the question names a label, and a box
where its number should be. In a share of the tasks (the *trap*) the box has drifted: to a row
without ink, or by half a line, so that it cuts the number. What `crop` observes says that it failed
and never where the number is: the page has to be looked at again.

Everything lies on a grid of ``GRID`` pixels, two cells of the pages' font, which small vision
towers see as one patch.
"""

import random
from dataclasses import dataclass

from regrpo.tools.glyphs import CELL_WIDTH, Box
from regrpo.workspace import PageFile

GRID = 2 * CELL_WIDTH
COLUMNS, ROWS = 5, 6
LABELS = ("Al", "Br", "Cu", "Fe", "Hg", "Kr", "Ni", "Sn")
NUM_LINES = 3


def box_at(row: int) -> Box:
    """Where the number of a row stands: two patches behind the label."""
    return (2 * GRID, row * GRID, 4 * GRID, (row + 1) * GRID)


@dataclass(frozen=True)
class Scan:
    """A page and where to look on it; ``asked`` is the box that the question gives."""

    page: PageFile
    label: str
    value: int
    box: Box
    asked: Box

    @property
    def question(self) -> str:
        where = ", ".join(map(str, self.asked))
        return f"What is the number at {self.label}, in [{where}]?"


def scan(rng: random.Random, path: str, *, trap: bool) -> Scan:
    """Draws a page at ``path``, and whom it is asked about; with the trap in another place."""
    rows = rng.sample(range(ROWS), NUM_LINES)
    labels = rng.sample(LABELS, NUM_LINES)
    values = rng.sample(range(100, 1000), NUM_LINES)
    lines = tuple(
        (0, GRID * row + 1, f"{label}  {value}")  # the gap ends the label's patch
        for row, label, value in zip(rows, labels, values, strict=True)
    )
    box = asked = box_at(rows[0])
    if trap:
        empty = [GRID * (row - rows[0]) for row in range(ROWS) if row not in rows]
        half = [s for s in (-GRID // 2, GRID // 2) if 0 <= box[1] + s <= (ROWS - 1) * GRID]
        shift = rng.choice(half if rng.random() < 0.25 else empty)
        asked = (box[0], box[1] + shift, box[2], box[3] + shift)
    page = PageFile(path, (COLUMNS * GRID, ROWS * GRID), lines)
    return Scan(page, labels[0], values[0], box, asked)
