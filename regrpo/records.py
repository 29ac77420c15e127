"""Records on disk: JSON or JSON Lines in the official ReGRPO schema.

A record is ``{id, image, answer, conversations: [{role, content}], rot_meta?}``; ``rot_meta`` holds
the failure, the reflection and the correction. Turns written as ``{from, value}`` (MM-Traj,
MAT-Agent) are read as well.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regrpo import provenance

Record = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROT_META = (
    "step_index",
    "error_type",
    "failed_action",
    "failed_observation",
    "reflection",
    "corrected_action",
)
REFLECTION = ("error_type", "evidence", "fix_plan")


class RecordError(ValueError):
    """A malformed record; the message names file, line or index, and what is expected."""


def normalize(raw: Any, where: str) -> Record:
    """Checks one record and brings its turns into ``role``/``content`` form.

    Raises:
        RecordError: something is missing or of the wrong type.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: got {type(raw).__name__}; expected an object")
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError(
            f"{where}: conversations is {turns!r:.40}; expected a non-empty list of turns"
        )
    messages = []
    for index, turn in enumerate(turns):
        here = f"{where}: conversations[{index}]"
        if not isinstance(turn, dict):
            raise RecordError(f"{here} is {turn!r:.40}; expected {{role, content}}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise RecordError(f"{here}: role is {role!r}; expected one of {sorted(ROLES)}")
        if not isinstance(content, str):
            raise RecordError(f"{here}: content is {type(content).__name__}; expected text")
        messages.append({"role": ROLES[role], "content": content})
    record = {k: v for k, v in raw.items() if k != "conversations"}
    record["conversations"] = messages
    record.setdefault("id", where)
    meta = record.get("rot_meta")
    if meta is not None:
        _require_keys(meta, ROT_META, f"{where}: rot_meta")
        _require_keys(meta["reflection"], REFLECTION, f"{where}: rot_meta.reflection")
    wrong = provenance.problem(record[provenance.KEY]) if provenance.KEY in record else None
    if wrong is not None:
        raise RecordError(f"{where}: {wrong}")
    return record


def _require_keys(value: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise RecordError(f"{where} is {value!r:.40}; expected an object with {', '.join(keys)}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise RecordError(f"{where} lacks {', '.join(missing)}")


def read_records(path: str | Path) -> list[Record]:
    """Reads ``.jsonl`` (a record a line) or ``.json`` (a list of records).

    Raises:
        FileNotFoundError: no such file. RecordError: what is wrong, and where.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        raise FileNotFoundError(f"no data file at {path}; expected .jsonl or .json records")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: {error}; expected UTF-8") from error
    if path.suffix == ".json":
        raw = _parse(text, str(path))
        if not isinstance(raw, list):
            raise RecordError(f"{path}: got {type(raw).__name__}; expected a list of records")
        records = [normalize(r, f"{path}[{i}]") for i, r in enumerate(raw)]
    else:
        # Not splitlines: a string may hold U+2028 and other separators as they are.
        lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1)]
        records = [normalize(_parse(line, at), at) for at, line in lines if line.strip()]
    if not records:
        raise RecordError(f"{path}: holds no record; expected at least one")
    return records


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: {error}; expected JSON") from error


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old or the new content, never a part."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """See ``write_atomically``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as handle:
        try:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        except BaseException:
            os.unlink(handle.name)
            raise
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Writes JSON Lines atomically."""
    write_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
