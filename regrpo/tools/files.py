"""`read_file` and `list_dir`: the files and folders of the workspace."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path, PurePosixPath

from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.parameters import PathText
from regrpo.tools.paths import listing, path_failure, read_inside


def read_file(root: Path, path: PathText) -> Observation:
    """Read a text file; .csv and .json are parsed. Symbolic links are never followed."""
    try:
        data = read_inside(root, path)
    except (OSError, ValueError) as error:
        return path_failure(root, path, error)
    try:
        text = _render(data, PurePosixPath(path).suffix.lower())
    except (ValueError, csv.Error, RecursionError) as error:
        return failure(error)
    return Observation(text, Status.OK) if text else Observation("(empty file)", Status.EMPTY)


def list_dir(root: Path, path: PathText = ".") -> Observation:
    """List a folder, one entry a line: `name`, `name/` (a folder) or `name -> target` (a link)."""
    try:
        text = listing(root, path)
    except (OSError, ValueError) as error:
        return path_failure(root, path, error)
    return Observation(text, Status.OK) if text else Observation("(empty folder)", Status.EMPTY)


def _render(data: bytes, suffix: str) -> str:
    text = data.decode("utf-8")
    if "\0" in text:  # valid UTF-8, yet no text: small SQLite files can look like this
        at = data.index(0)
        raise UnicodeDecodeError("utf-8", data, at, at + 1, "null byte")
    if suffix == ".csv":
        return "\n".join(", ".join(row) for row in csv.reader(io.StringIO(text), strict=True))
    if suffix == ".json" and text:
        return json.dumps(json.loads(text), ensure_ascii=False)
    return text
