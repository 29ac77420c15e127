"""Records of others into our form, and back into the official schema.

Our form is the official schema with ``role``/``content`` turns and the key ``regrpo`` (see
`regrpo.provenance`). Nothing of the source is lost: unknown keys of a record stay where they are,
and ``regrpo.source`` keeps what had to be changed: ``turns``, one object a turn as it was but for
its text, and ``added``, the keys that were missing. Two round trips are exact:

- ``to_normal(to_official(x)) == x`` for every record ``x`` in our form;
- ``to_official(to_normal(y)) == y`` for every official record ``y`` (``role``/``content``), and
  ``to_official(..., turns="source")`` gives ``y`` back whatever its turns looked like.

So ``to_official`` leaves ``regrpo`` out where importing again would make the same, and only there.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrpo import provenance
from regrpo.benchmarks.gta_dialogs import gta_records
from regrpo.config import DataExportConfig, DataImportConfig
from regrpo.image_files import PLACEHOLDER, placeholder
from regrpo.prompts import shown_images
from regrpo.records import Record, RecordError, normalize, write_atomically, write_records

REPORT = "import_report.json"


def scan(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The JSON values of a ``.json`` list or of ``.jsonl`` lines, each with its place.

    Of a ``.json`` file of the GTA benchmark: its reference dialogs as records.

    What cannot be read comes as a `RecordError` in place of the value, and the rest goes on: a bad
    line is one error, and of a list that is torn the whole elements before the tear are kept.

    Raises:
        FileNotFoundError: no such file. RecordError: a ``.json`` file that holds no list.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".jsonl", ".json"):
        raise FileNotFoundError(f"no data file at {path}; expected .jsonl or .json records")
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _load(line, f"{path}:{number}")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: {error}; expected UTF-8") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield from _before_the_tear(text, path, error)
        return
    if isinstance(values, dict) and values and all(_is_gta(value) for value in values.values()):
        yield from gta_records(values, str(path))
        return
    if not isinstance(values, list):
        raise RecordError(f"{path}: got {type(values).__name__}; expected a list of records")
    for index, value in enumerate(values):
        yield f"{path}[{index}]", value


def _is_gta(value: Any) -> bool:
    return isinstance(value, dict) and "dialogs" in value


def _load(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return RecordError(f"{where}: {error}; expected JSON in UTF-8")


def _before_the_tear(text: str, path: Path, error: Exception) -> Iterator[tuple[str, Any]]:
    decoder, position, index = json.JSONDecoder(), len(text) - len(text.lstrip()), 0
    if text[position : position + 1] == "[":
        position += 1
        while True:
            while text[position : position + 1].isspace():
                position += 1
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as inner:
                error = inner
                break
            yield f"{path}[{index}]", value
            index += 1
            while text[position : position + 1].isspace():
                position += 1
            if text[position : position + 1] != ",":
                break
            position += 1
    where = f"{path}[{index}]"
    yield where, RecordError(f"{where}: {error}; expected JSON; what follows is not read")


def _default_origin(record: Record) -> dict[str, Any]:
    """What an import marks a record with: the official release's teacher invents its failures."""
    if record.get("rot_meta") is not None:
        return {"provenance": "teacher", "failure": "teacher", "reflection": "teacher"}
    return {"provenance": "recorded"}


def to_normal(raw: Any, where: str, origin: str | None = None) -> Record:
    """Brings a record of any known form into ours.

    Args:
        where: its place, for messages and for an id where there is none.
        origin: provenance of a record that does not say; None takes ``teacher`` for records with
            ``rot_meta`` and ``recorded`` for others.

    Raises:
        RecordError: what is wrong, and where.
    """
    record = normalize(raw, where)
    _require_text(record, where)
    source: dict[str, Any] = {}
    if "id" not in raw:
        source["added"] = ["id"]
    if raw["conversations"] != record["conversations"]:
        source["turns"] = [_frame(turn) for turn in raw["conversations"]]
    if provenance.KEY in raw:
        block = dict(raw[provenance.KEY])
    else:
        block = _default_origin(record)
        if origin is not None:
            block.update(dict.fromkeys(block.keys() - {"reflection"}, origin))
    if source:
        block["source"] = source
    # In the order of the source; what it lacks comes last.
    ordered = {key: record[key] for key in [*raw, *record] if key != provenance.KEY}
    return {**ordered, provenance.KEY: block}


def _require_text(record: Record, where: str) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise RecordError(
            f"{where}: holds the lone surrogate {bad!r}; expected Unicode text"
        ) from error


def _frame(turn: dict[str, Any]) -> dict[str, Any]:
    text = "content" if "content" in turn else "value"
    return {key: None if key == text else value for key, value in turn.items()}


def _unframe(frame: dict[str, Any], content: str) -> dict[str, Any]:
    text = "content" if "content" in frame else "value"
    return {key: content if key == text else value for key, value in frame.items()}


def show_images(record: Record) -> Record:
    """A record whose images are listed, by other keys than placeholders, with all of them shown
    behind the first user turn."""
    files = record.get("image") or {}
    if not isinstance(files, dict) or any(PLACEHOLDER.fullmatch(key) for key in files):
        return record
    messages = [dict(message) for message in record["conversations"]]
    first = next(m for m in messages if m["role"] == "user")
    first["content"] += shown_images(len(files))
    named = {placeholder(index): path for index, path in enumerate(files.values())}
    return {**record, "image": named, "conversations": messages}


def to_official(record: Record, turns: str = "official") -> Record:
    """The inverse of `to_normal`.

    Args:
        turns: ``official`` writes ``role``/``content``; ``source`` restores the turns, and leaves
            out the keys that the import had to add.

    Raises:
        RecordError: the source's turns are asked for, but the record has gained or lost some.
    """
    block = dict(record.get(provenance.KEY, {}))
    exported = {k: v for k, v in record.items() if k != provenance.KEY}
    if turns == "source":
        source = block.pop("source", {})
        for key in source.get("added", ()):
            exported.pop(key, None)
        if "turns" in source:
            frames, turns_now = source["turns"], record["conversations"]
            if len(frames) != len(turns_now):
                raise RecordError(
                    f"record {record['id']!r} has {len(turns_now)} turns; expected the "
                    f"{len(frames)} that were imported"
                )
            exported["conversations"] = [
                _unframe(frame, turn["content"])
                for frame, turn in zip(frames, turns_now, strict=True)
            ]
    if provenance.KEY in record and block != _default_origin(record):
        exported[provenance.KEY] = block
    return exported


@dataclass
class Reading:
    """What was read of several files, and a line for everything that was not."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line a file, then a line for everything that was left out."""
        counts = [f"{path}: {len(records)} records" for path, records in self.records.items()]
        return [*counts, *self.missing, *(f"skipped {line}" for line in self.skipped)]


def read_files(files: list[str], origin: str | None = None) -> Reading:
    """Reads files into our form; what is wrong with one is a line, and the rest is kept."""
    reading = Reading()
    for path in files:
        records: list[Record] = []
        places: list[str] = []
        try:
            for where, value in scan(path):
                try:
                    if isinstance(value, RecordError):
                        raise value
                    records.append(to_normal(value, where, origin))
                    places.append(where)
                except RecordError as error:
                    reading.skipped.append(_one_line(error))
        except (OSError, RecordError) as error:
            reading.missing.append(_one_line(error))
            continue
        reading.records[path], reading.places[path] = records, places
    return reading


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Report:
    """What a command has to say, and what makes it end with an error although its work is done."""

    lines: list[str]
    problem: str | None = None


def missing_files(reading: Reading) -> str | None:
    """`Report.problem` for files that could not be read at all."""
    count = len(reading.missing)
    return f"{count} of the files could not be read; the rest is done" if count else None


def targets(out: str, files: list[str]) -> dict[str, Path]:
    """Where each file goes in a folder.

    Raises:
        ValueError: two files would go to the same place.
    """
    goals = {path: Path(out) / f"{Path(path).stem}.jsonl" for path in files}
    if len(set(goals.values())) < len(files):
        raise ValueError(f"source: two files have the same name: {', '.join(files)}")
    return goals


def import_corpora(config: DataImportConfig) -> Report:
    """Writes a ``.jsonl`` in our form for every file, and the report as ``REPORT``."""
    goals = targets(config.out, config.source)
    reading = read_files(config.source, config.provenance)
    for path, records in reading.records.items():
        write_records(goals[path], map(show_images, records) if config.images else records)
    report = {
        "files": {path: len(records) for path, records in reading.records.items()},
        "imported": sum(map(len, reading.records.values())),
        "skipped": reading.skipped,
        "missing": reading.missing,
    }
    write_atomically(Path(config.out) / REPORT, json.dumps(report, indent=2) + "\n")
    total = f"{config.out}: {report['imported']} imported, {len(reading.skipped)} skipped"
    return Report([*reading.lines(), total], missing_files(reading))


def export_corpus(config: DataExportConfig) -> Report:
    """Writes all records to one ``.json`` list or ``.jsonl`` file in the official schema."""
    reading = read_files(config.source)
    exported = []
    for record in (r for records in reading.records.values() for r in records):
        try:
            exported.append(to_official(record, config.turns))
        except RecordError as error:
            reading.skipped.append(_one_line(error))
    if config.out.endswith(".jsonl"):
        write_records(config.out, exported)
    else:
        write_atomically(config.out, json.dumps(exported, indent=2, ensure_ascii=False) + "\n")
    total = f"{config.out}: {len(exported)} exported, {len(reading.skipped)} skipped"
    return Report([*reading.lines(), total], missing_files(reading))
