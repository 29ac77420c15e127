"""Tasks over page images that only looking at them solves.

``scan``: rows of text stand about a page, one of them a number; the question gives the box where
the number should be, and the page is not shown. In a share of the tasks (the *trap*) the box has
drifted: to a row without ink, or by half a line, so that it cuts what stands there. Then `crop`
shows the whole page, and no text says where the number is: it has to be looked for.

Everything lies on a grid of ``GRID`` pixels, two cells of the pages' font, which small vision
towers see as one patch.
"""

import random
from dataclasses import dataclass

from regrpo.tools.glyphs import CELL_WIDTH, Box
from regrpo.workspace import PageFile

GRID = 2 * CELL_WIDTH
COLUMNS, ROWS = 4, 6
WORDS = ("ash", "bay", "elm", "fig", "fir", "gum", "oak", "yew")
NUM_WORDS = 2


def box_at(row: float) -> Box:
    """Where the text of a row stands; halves are between rows."""
    top = round(row * GRID)
    return (GRID, top, 3 * GRID, top + GRID)


@dataclass(frozen=True)
class Scan:
    """A page and where to look on it; ``asked`` is the box that the question gives."""

    page: PageFile
    value: int
    box: Box
    asked: Box

    @property
    def question(self) -> str:
        where = ", ".join(map(str, self.asked))
        return f"What is the number on the page, in [{where}]?"


def scan(rng: random.Random, path: str, *, trap: bool) -> Scan:
    """Draws a page at ``path`` and a question about it, with the trap about another place."""
    rows = rng.sample(range(ROWS), 1 + NUM_WORDS)
    value = rng.randrange(100, 1000)
    texts = (str(value), *rng.sample(WORDS, NUM_WORDS))
    lines = tuple((GRID, GRID * row + 1, text) for row, text in zip(rows, texts, strict=True))
    box = asked = box_at(rows[0])
    if trap:
        half = [row for row in (rows[0] - 0.5, rows[0] + 0.5) if 0 <= row <= ROWS - 1]
        empty = [row for row in range(ROWS) if row not in rows]
        asked = box_at(rng.choice(half if rng.random() < 0.25 else empty))
    return Scan(PageFile(path, (COLUMNS * GRID, ROWS * GRID), lines), value, box, asked)
