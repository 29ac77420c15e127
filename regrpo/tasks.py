"""Generated tasks over real tools, with known answers.

Every task comes with its workspace and the reference calls that solve it. In a share of the tasks
the call that the wording suggests fails (the *trap*), and only the observation tells what to do
instead:

- ``links``: the file is a symbolic link, which the tools do not follow; the listing shows where
  links point.
- ``renames``: the column was renamed, several times; the schema's comments keep the history.
- ``see``: the term is not indexed; the catalogue refers from term to term.
- ``formats``: the file has another extension.
- ``layout``: the box is stale; the page's layout says where the field is now.
- ``label``, ``lookup``, ``sum``: two and three steps through the above.

The first three are serial: three chains are interleaved, each ends in something that exists and
answers, and only the chain that starts at what was asked is right. So a guess among what exists is
right one time in three, and following the chain takes one look a hop. Wording and workspace look
the same with and without the trap.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from regrpo.names import NAMES
from regrpo.tool_calls import ToolCall
from regrpo.tools.glyphs import draw_page, read_page
from regrpo.vision_tasks import scan
from regrpo.workspace import (
    LinkFile,
    PageFile,
    SqliteFile,
    TextFile,
    WorkspaceFile,
    read_image,
)

NUM_CHAINS = 3
MAX_HOPS = 7
EXTENSIONS = ("csv", "ini", "json", "log", "md", "txt")
TABLE, STORE, PAGE = "goods", "store.db", "page.png"


@dataclass(frozen=True)
class Step:
    """One step: the call that works, and the call the wording suggests if that one fails."""

    call: ToolCall
    trap: ToolCall | None = None
    trap_type: str | None = None


@dataclass(frozen=True)
class Task:
    """A question about a workspace, its answer, and reference steps (the last is ``final_answer``).

    A user's task has no steps, and its workspace may be an existing folder. ``images`` are the
    paths, in the workspace, of what is shown with the question, none or some, where the tools give
    pictures (`regrpo.tools.VISION_TOOLS`); None where they give text.
    """

    id: str
    family: str
    question: str
    answer: str
    workspace: tuple[WorkspaceFile, ...] | Path
    steps: tuple[Step, ...]
    images: tuple[str, ...] | None = None

    @property
    def num_images(self) -> int | None:
        """How many images are shown with the question; None where the tools give text."""
        return None if self.images is None else len(self.images)

    @property
    def trapped(self) -> bool:
        """Whether the wording suggests a call that fails."""
        return any(step.trap is not None for step in self.steps)


def task_images(task: Task) -> tuple[bytes, ...]:
    """What is shown with a task's question.

    Raises:
        ValueError: an image is not in the workspace, named.
    """
    images = []
    for path in task.images or ():
        data = read_image(task.workspace, path)
        if data is None:
            raise ValueError(f"task {task.id}: no image {path!r} in its workspace")
        images.append(data)
    return tuple(images)


class _Scene:
    """A workspace in the making; hands out names and values that occur once."""

    def __init__(self, rng: random.Random, hops: tuple[int, int], tail: float, trap_share: float):
        self.rng = rng
        self.hops = hops
        self.tail = tail
        self.trap_share = trap_share
        self.files: list[WorkspaceFile] = []
        self._names = rng.sample(NAMES, len(NAMES))
        self._values = rng.sample(range(10, 60), 50)

    def name(self) -> str:
        return self._names.pop()

    def value(self) -> int:
        return self._values.pop()

    def trap(self) -> bool:
        return self.rng.random() < self.trap_share

    def chains(self) -> tuple[str, str, list[tuple[str, str]], list[str]]:
        """Interleaved chains: what is asked, where it ends, all edges shuffled, all ends shuffled.

        Without the trap the asked name is an end itself, and the chains lead elsewhere.
        """
        hops = self.rng.randint(*self.hops)
        while self.tail > 0 and hops < MAX_HOPS and self.rng.random() < self.tail:
            hops += 1
        chains = [[self.name() for _ in range(hops + 1)] for _ in range(NUM_CHAINS)]
        edges = [edge for chain in chains for edge in pairwise(chain)]
        ends = [chain[-1] for chain in chains]
        self.rng.shuffle(edges)
        if self.trap():
            asked, target = chains[0][0], chains[0][-1]
        else:
            asked = target = self.name()
            ends[0] = asked
            edges = [e for e in edges if e[1] != chains[0][-1]]
        self.rng.shuffle(ends)
        return asked, target, edges, ends


def _content(extension: str, value: int) -> str:
    if extension == "csv":
        return f"number\n{value}\n"
    if extension == "json":
        return f'{{"number": {value}}}'
    return f"number {value}"


def _read(path: str) -> ToolCall:
    return ToolCall("read_file", (path,))


def _linked_file(scene: _Scene) -> tuple[str, Step, int]:
    """A file that may be a chain of links: (asked path, step, number inside)."""
    asked, target, edges, ends = scene.chains()
    value = 0
    for end in ends:
        number = scene.value()
        scene.files.append(TextFile(end, _content("txt", number)))
        if end == target:
            value = number
    scene.files += [LinkFile(a, b) for a, b in edges]
    if asked == target:
        return asked, Step(_read(asked)), value
    return asked, Step(_read(target), _read(asked), "ArgInvalid"), value


def _reformatted_file(scene: _Scene) -> tuple[str, Step, int]:
    """A file that may have another extension than the one asked for."""
    name, value = scene.name(), scene.value()
    asked, actual = scene.rng.sample(EXTENSIONS, 2)
    trap = scene.trap()
    if not trap:
        actual = asked
    scene.files.append(TextFile(f"{name}.{actual}", _content(actual, value)))
    for _ in range(4):
        extension = scene.rng.choice(EXTENSIONS)
        scene.files.append(
            TextFile(f"{scene.name()}.{extension}", _content(extension, scene.value()))
        )
    path = f"{name}.{asked}"
    if not trap:
        return path, Step(_read(path)), value
    return path, Step(_read(f"{name}.{actual}"), _read(path), "ArgInvalid"), value


def _document(scene: _Scene) -> tuple[str, Step, int]:
    """A document that may be catalogued under another term; every end of a chain is a document."""
    asked, target, edges, ends = scene.chains()
    value = 0
    for end in ends:
        number = scene.value()
        scene.files.append(TextFile(f"docs/{end}.txt", f"{end} {number}"))
        if end == target:
            value = number
    lines = "".join(f"{a} -> {b}\n" for a, b in edges)
    scene.files.append(TextFile("docs/see.idx", lines))
    call = ToolCall("search", (target,))
    if asked == target:
        return asked, Step(call), value
    return asked, Step(call, ToolCall("search", (asked,)), "InfoInsufficient"), value


def _field(scene: _Scene, content: Callable[[], str]) -> tuple[str, str, Step, str]:
    """A field on a page whose box may be stale: (name, box as text, step, content)."""
    rows = scene.rng.sample(range(6), 4)
    lines = tuple(
        (scene.rng.randint(0, 60), 8 + 16 * row, f"{scene.name()} {content()}") for row in rows
    )
    size = (200, 112)
    scene.files.append(PageFile(PAGE, size, lines))
    _, y, text = lines[0]
    name, inside = text.split()
    found = read_page(draw_page(size, lines[:1]).convert("1"))
    box = asked = found[0].ink
    if scene.trap():
        shift = 8 + 16 * scene.rng.choice(sorted(set(range(6)) - set(rows))) - y
        asked = (box[0], box[1] + shift, box[2], box[3] + shift)
    call = ToolCall("read_region", (PAGE, *box))
    where = ", ".join(map(str, asked))
    if asked == box:
        return name, where, Step(call), inside
    trap = ToolCall("read_region", (PAGE, *asked))
    return name, where, Step(call, trap, "GroundingDrift"), inside


def _links(scene: _Scene) -> tuple[str, str, list[Step]]:
    path, step, value = _linked_file(scene)
    return f"What is the number in the file {path}?", str(value), [step]


def _formats(scene: _Scene) -> tuple[str, str, list[Step]]:
    path, step, value = _reformatted_file(scene)
    return f"What is the number in the file {path}?", str(value), [step]


def _renames(scene: _Scene) -> tuple[str, str, list[Step]]:
    asked, target, edges, ends = scene.chains()
    values = {end: scene.value() for end in ends}
    history = "".join(f"-- {a} -> {b}\n" for a, b in edges)
    script = (
        f"CREATE TABLE {TABLE} (\n{history}{', '.join(ends)});\n"
        f"INSERT INTO {TABLE} VALUES ({', '.join(str(values[end]) for end in ends)});"
    )
    scene.files.append(SqliteFile(STORE, script))

    def query(column: str) -> ToolCall:
        return ToolCall("sql", (STORE, f"SELECT {column} FROM {TABLE}"))

    step = Step(query(target))
    if asked != target:
        step = Step(query(target), query(asked), "ArgInvalid")
    return f"What is the {asked} of the {TABLE} in {STORE}?", str(values[target]), [step]


def _see(scene: _Scene) -> tuple[str, str, list[Step]]:
    asked, step, value = _document(scene)
    return f"What number is filed under {asked}?", str(value), [step]


def _layout(scene: _Scene) -> tuple[str, str, list[Step]]:
    name, where, step, inside = _field(scene, lambda: str(scene.value()))
    return f"What is the number at {name} on {PAGE}, in [{where}]?", inside, [step]


def _label(scene: _Scene) -> tuple[str, str, list[Step]]:
    term, search, value = _document(scene)
    others = iter([term, *(scene.name() for _ in range(3))])
    name, where, read, _ = _field(scene, lambda: next(others))
    question = f"What number is filed under the term at {name} on {PAGE}, in [{where}]?"
    return question, str(value), [read, search]


def _lookup(scene: _Scene) -> tuple[str, str, list[Step]]:
    path, read, value = scene.rng.choice((_linked_file, _reformatted_file))(scene)
    topic = scene.name()
    scene.files.append(TextFile(f"docs/{topic}.txt", f"{topic} {path}"))
    for _ in range(2):
        other = scene.name()
        elsewhere = scene.name() + scene.rng.choice(("", *(f".{e}" for e in EXTENSIONS)))
        scene.files.append(TextFile(f"docs/{other}.txt", f"{other} {elsewhere}"))
    question = f"What is the number in the file filed under {topic}?"
    return question, str(value), [Step(ToolCall("search", (topic,))), read]


def _sum(scene: _Scene) -> tuple[str, str, list[Step]]:
    first, read_first, a = _reformatted_file(scene)
    second, read_second, b = _linked_file(scene)
    add = Step(ToolCall("calculator", (f"{a} + {b}",)))
    question = f"What is the sum of the numbers in the files {first} and {second}?"
    return question, str(a + b), [read_first, read_second, add]


FAMILIES: dict[str, Callable[[_Scene], tuple[str, str, list[Step]]]] = {
    "links": _links,
    "renames": _renames,
    "see": _see,
    "formats": _formats,
    "layout": _layout,
    "label": _label,
    "lookup": _lookup,
    "sum": _sum,
}
VISION_FAMILIES = ("scan",)  # of pages that have to be looked at
SERIAL_FAMILIES = ("links", "renames", "see")


def generate_tasks(
    count: int,
    *,
    seed: int,
    first: int = 0,
    hops: tuple[int, int] = (1, 2),
    tail: float = 0.0,
    trap_share: float = 0.65,
    families: Sequence[str] = tuple(FAMILIES),
) -> list[Task]:
    """The tasks ``first`` to ``first + count - 1`` of a seed, the families in turn.

    Args:
        seed: task ``i`` depends on ``(seed, i)`` and the other arguments only.
        hops: least and most hops of a chain.
        tail: probability that a chain is a hop longer than drawn, again and again, up to
            ``MAX_HOPS``.
        trap_share: how often the call suggested by the wording fails, per step that can have a
            trap.

    Raises:
        ValueError: an argument out of range, named.
    """
    if count < 0 or first < 0:
        raise ValueError(f"count, first: got {count}, {first}; expected 0 or more")
    known = {*FAMILIES, *VISION_FAMILIES}
    unknown = sorted(set(families) - known)
    if unknown or not families:
        raise ValueError(f"families: got {unknown or 'none'}; expected some of {sorted(known)}")
    if not 1 <= hops[0] <= hops[1] <= MAX_HOPS:
        raise ValueError(f"hops: got {hops}; expected 1 <= least <= most <= {MAX_HOPS}")
    if not 0 <= tail < 1:
        raise ValueError(f"tail: got {tail}; expected a probability below 1")
    if not 0 <= trap_share <= 1:
        raise ValueError(f"trap_share: got {trap_share}; expected a share between 0 and 1")
    tasks = []
    for index in range(first, first + count):
        scene = _Scene(random.Random(f"{seed}-{index}"), hops, tail, trap_share)
        tasks.append(_task(families[index % len(families)], seed, index, scene))
    return tasks


def _task(family: str, seed: int, index: int, scene: _Scene) -> Task:
    images: tuple[str, ...] | None = None
    if family in VISION_FAMILIES:
        seen = scan(scene.rng, PAGE, trap=scene.trap())
        scene.files.append(seen.page)
        question, answer, images = seen.question, str(seen.value), ()
        call, asked = (ToolCall("crop", (PAGE, *box)) for box in (seen.box, seen.asked))
        steps = [Step(call) if asked == call else Step(call, asked, "GroundingDrift")]
    else:
        question, answer, steps = FAMILIES[family](scene)
    scene.rng.shuffle(scene.files)
    final = Step(ToolCall("final_answer", (answer,)))
    return Task(
        id=f"{family}-{seed}-{index}",
        family=family,
        question=question,
        answer=answer,
        workspace=tuple(scene.files),
        steps=(*steps, final),
        images=images,
    )
