"""Tasks over page images that only looking at them solves.

``scan``: lines of a label and a number stand about a page; the question names a label, and a box
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
COLUMNS, ROWS = 8, 6
LABELS = ("ash", "bay", "elm", "fig", "fir", "gum", "oak", "yew")
NUM_LINES = 3


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
    columns = [rng.randrange(COLUMNS - 3) for _ in rows]  # label and number take four of them
    lines = tuple(
        (GRID * column, GRID * row + 1, f"{label} {value}")
        for row, column, label, value in zip(rows, columns, labels, values, strict=True)
    )
    left, top = GRID * (columns[0] + 2), GRID * rows[0]
    box = asked = (left, top, left + 2 * GRID, top + GRID)
    if trap:
        free = [GRID * row - top for row in range(ROWS) if row not in rows]
        half = [shift for shift in (-GRID // 2, GRID // 2) if 0 <= top + shift <= (ROWS - 1) * GRID]
        shift = rng.choice(half if rng.random() < 0.25 else free)
        asked = (box[0], box[1] + shift, box[2], box[3] + shift)
    page = PageFile(path, (COLUMNS * GRID, ROWS * GRID), lines)
    return Scan(page, labels[0], values[0], box, asked)
