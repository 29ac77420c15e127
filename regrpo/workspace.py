"""The files a task comes with, and the throw-away folder they are built into."""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from regrpo.tools.glyphs import CELL_HEIGHT, CELL_WIDTH, CHARACTERS, MAX_SPACES, draw_page
from regrpo.tools.paths import read_inside

MAX_PAGE_SIDE = 2000
# Bounds a script that never ends; a schema with a few thousand rows takes well under a million.
_MAX_SQLITE_STEPS = 20_000_000


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file, written as it is."""

    path: str
    content: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class LinkFile:
    """A symbolic link; `target` is relative to the link's folder and stays in the workspace."""

    path: str
    target: str
    kind: ClassVar[str] = "link"


@dataclass(frozen=True)
class SqliteFile:
    """A SQLite database made by a script of SQL statements."""

    path: str
    script: str
    kind: ClassVar[str] = "sqlite"


@dataclass(frozen=True)
class PageFile:
    """A PNG page of `size` (width, height) pixels, with lines of text at `(x, y)`, black on white.

    Lines keep clear of each other, so that every page reads back exactly as it was written.
    """

    path: str
    size: tuple[int, int]
    lines: tuple[tuple[int, int, str], ...]
    kind: ClassVar[str] = "page"

    def __post_init__(self) -> None:
        width, height = self.size
        object.__setattr__(self, "size", (width, height))
        object.__setattr__(self, "lines", tuple((x, y, text) for x, y, text in self.lines))


WorkspaceFile = TextFile | LinkFile | SqliteFile | PageFile
_KINDS: dict[str, Any] = {cls.kind: cls for cls in (TextFile, LinkFile, SqliteFile, PageFile)}


def file_to_dict(file: WorkspaceFile) -> dict[str, Any]:
    """A file as JSON-serialisable fields, tagged with its `kind`."""
    return {"kind": file.kind, **asdict(file)}


def file_from_dict(fields: dict[str, Any]) -> WorkspaceFile:
    """The inverse of `file_to_dict`; ValueError for an unknown kind or wrong fields."""
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    try:
        file: WorkspaceFile = _KINDS[kind](**{k: v for k, v in fields.items() if k != "kind"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a workspace file of kind {kind!r}: {error}") from error
    _check(file)
    return file


def build_workspace(root: Path, files: Sequence[WorkspaceFile]) -> None:
    """Write the files under the existing, empty folder `root`.

    Raises ValueError, before anything is written, for a path or link target that leaves the
    workspace, two files at one path, a file below another file, or a page that cannot be drawn;
    and for a script that SQLite does not accept.
    """
    if any(root.iterdir()):
        raise ValueError(f"root must be an empty folder, got {str(root)!r}")
    paths = set()
    for file in files:
        _check(file)
        if file.path in paths:
            raise ValueError(f"two files have the path {file.path!r}")
        paths.add(file.path)
    for path in paths:
        for parent in map(str, Path(path).parents):
            if parent in paths:
                raise ValueError(f"{path!r} lies below {parent!r}, which is a file")
    for file in files:
        target = root / file.path
        if "/" in file.path:
            target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, TextFile):
            target.write_text(file.content, encoding="utf-8", newline="")
        elif isinstance(file, LinkFile):
            target.symlink_to(file.target)
        elif isinstance(file, SqliteFile):
            _build_sqlite(target, file)
        else:
            _draw(file, target)


def read_image(workspace: tuple[WorkspaceFile, ...] | Path, path: str) -> bytes | None:
    """The bytes of an image of a workspace, built or not; None where there is none."""
    if isinstance(workspace, Path):
        try:
            return read_inside(workspace, path)
        except (OSError, ValueError):
            return None
    for file in workspace:
        if isinstance(file, PageFile) and file.path == path:
            buffer = io.BytesIO()
            _draw(file, buffer)
            return buffer.getvalue()
    return None


def _draw(page: PageFile, target: Path | io.BytesIO) -> None:
    draw_page(page.size, page.lines).save(target, format="PNG", compress_level=1)


def _build_sqlite(target: Path, file: SqliteFile) -> None:
    connection = sqlite3.connect(target, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=off")
        connection.execute("PRAGMA synchronous=off")
        connection.execute("PRAGMA locking_mode=exclusive")
        connection.set_authorizer(_deny_attach)  # ATTACH and VACUUM INTO write elsewhere
        connection.set_progress_handler(lambda: 1, _MAX_SQLITE_STEPS)
        connection.executescript(f"BEGIN;\n{file.script}\n;COMMIT;")
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        raise ValueError(f"script of {file.path!r} fails: {error}") from error
    finally:
        connection.close()


def _deny_attach(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def _check(file: WorkspaceFile) -> None:
    _check_path("path", file.path)
    if isinstance(file, TextFile):
        _check_text(file.path, "content", file.content)
    elif isinstance(file, SqliteFile):
        _check_text(file.path, "script", file.script)
    elif isinstance(file, LinkFile):
        _check_text(file.path, "target", file.target)
        # In `folder/..` the folder may itself be a link, and its parent is then anywhere.
        if file.target != os.path.normpath(file.target):
            raise ValueError(f"target of {file.path!r} must be normalised, got {file.target!r}")
        _check_path(
            "target", os.path.normpath(os.path.join(os.path.dirname(file.path), file.target))
        )
    elif isinstance(file, PageFile):
        _check_page(file)
    else:
        raise ValueError(f"expected a workspace file, got {type(file).__name__}")


def _check_text(path: str, name: str, value: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} of {path!r} must be str, got {type(value).__name__}")


def _check_path(name: str, path: str) -> None:
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name} must be relative and stay in the workspace, got {path!r}")


def _check_page(file: PageFile) -> None:
    width, height = file.size
    if not all(
        isinstance(n, int) for n in (width, height, *(n for line in file.lines for n in line[:2]))
    ):
        raise ValueError(f"size and positions of {file.path!r} must be int")
    if not (0 < width <= MAX_PAGE_SIDE and 0 < height <= MAX_PAGE_SIDE):
        raise ValueError(f"size of {file.path!r} must be 1 to {MAX_PAGE_SIDE}, got {file.size}")
    boxes: list[tuple[int, int, int, int, str]] = []
    for x, y, text in file.lines:
        if not isinstance(text, str) or not text or text != text.strip():
            raise ValueError(f"{file.path!r}: a line must be text without white space around it")
        if not set(text) <= set(CHARACTERS):
            raise ValueError(f"{file.path!r}: the font lacks a character of {text!r}")
        if " " * (MAX_SPACES + 1) in text:
            raise ValueError(f"{file.path!r}: more than {MAX_SPACES} spaces in a row in {text!r}")
        x1, y1 = x + CELL_WIDTH * len(text), y + CELL_HEIGHT
        if x < 0 or y < 0 or x1 > width or y1 > height:
            raise ValueError(f"{file.path!r}: {text!r} at ({x}, {y}) leaves the page {file.size}")
        gap = CELL_WIDTH * (MAX_SPACES + 1)
        for left, top, right, bottom, other in boxes:
            if x < right + gap and left < x1 + gap and y < bottom and top < y1:
                raise ValueError(
                    f"{file.path!r}: {text!r} and {other!r} are too close to each other"
                )
        boxes.append((x, y, x1, y1, text))
