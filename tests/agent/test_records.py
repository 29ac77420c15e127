"""Records on disk: both turn schemas, every malformed case, atomic writes, the official files."""

import json
import os
from pathlib import Path

import pytest

from regrpo import records
from regrpo.records import RecordError, read_records, write_atomically, write_records

TURNS = [{"role": "user", "content": "Task: ?"}, {"role": "assistant", "content": "Thought: x"}]
META = {
    "src_id": "a",
    "step_index": 0,
    "error_type": "ArgInvalid",
    "failed_action": "f",
    "failed_observation": "o",
    "reflection": {"error_type": "ArgInvalid", "evidence": "e", "fix_plan": "p"},
    "corrected_action": "c",
}


@pytest.fixture(scope="module")
def data_dir():
    folder = os.environ.get("REGRPO_DATA_DIR")
    if not folder:
        pytest.skip("REGRPO_DATA_DIR is unset: no official records to read")
    return Path(folder)


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_both_turn_schemas_read_the_same(tmp_path):
    other = [{"from": "human", "value": "Task: ?"}, {"from": "gpt", "value": "Thought: x"}]
    rows = [
        {"id": "a", "conversations": TURNS, "answer": "1"},
        {"id": "a", "conversations": other, "answer": "1"},
    ]
    as_list = written(tmp_path, "r.json", json.dumps(rows))
    as_lines = written(tmp_path, "r.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_records(as_list) == read_records(as_lines)
    assert read_records(as_list)[0] == read_records(as_list)[1] == rows[0]


def test_unknown_fields_are_kept_and_a_missing_id_is_the_place(tmp_path):
    path = written(tmp_path, "r.jsonl", json.dumps({"conversations": TURNS, "extra": [1]}))
    (record,) = read_records(path)
    assert record["extra"] == [1]
    assert record["id"] == f"{path}:1"


def test_write_then_read_gives_equal_records(tmp_path):
    # Separators that Python's splitlines would split at, though JSON leaves them in strings.
    odd = "a\u2028b\u2029c\x85d\x0be\x1cf\n\té€\U0001f600"
    rows = [
        {"id": "1", "conversations": [{"role": "user", "content": odd}], "rot_meta": META},
        {"id": "2", "conversations": TURNS},
    ]
    write_records(tmp_path / "deep" / "r.jsonl", rows)
    assert read_records(tmp_path / "deep" / "r.jsonl") == rows


GOOD = json.dumps({"id": "a", "conversations": TURNS})


def turns(*values):
    return json.dumps({"id": "a", "conversations": list(values)})


MALFORMED = {
    "not json": ("{", "JSON"),
    "not an object": ("3", "expected an object"),
    "no turns": ('{"id": "a"}', "conversations is None; expected a non-empty list"),
    "empty turns": ('{"conversations": []}', "non-empty list of turns"),
    "turns are text": ('{"conversations": "hello"}', "non-empty list of turns"),
    "turn is text": (turns("hello"), r"conversations[0] is 'hello'; expected {role, content}"),
    "unknown role": (turns(*TURNS, {"role": "tool", "content": "x"}), "[2]: role is 'tool'"),
    "no role": (turns({"content": "x"}), "role is None; expected one of"),
    "role is a list": (turns({"role": ["user"], "content": "x"}), "role is ['user']"),
    "content is a number": (turns({"role": "user", "content": 3}), "content is int; expected text"),
    "no content": (turns({"role": "user"}), "content is NoneType; expected text"),
    "meta is text": (json.dumps({"conversations": TURNS, "rot_meta": "x"}), "rot_meta is 'x'"),
    "meta lacks": (
        json.dumps({"conversations": TURNS, "rot_meta": {**META, "reflection": None}}),
        "rot_meta.reflection is None; expected an object with error_type, evidence, fix_plan",
    ),
    "meta lacks keys": (
        json.dumps({"conversations": TURNS, "rot_meta": {"step_index": 1}}),
        "rot_meta lacks error_type, failed_action",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_record_is_named_with_its_place(tmp_path, case):
    text, expected = MALFORMED[case]
    lines = written(tmp_path, "r.jsonl", f"{GOOD}\n\n{text}\n{GOOD}\n")
    with pytest.raises(RecordError) as error:
        read_records(lines)
    assert str(error.value).startswith(f"{lines}:3")
    assert expected in str(error.value)
    whole = written(tmp_path, "r.json", f"[{GOOD}, {text}]")
    with pytest.raises(RecordError) as error:
        read_records(whole)
    assert str(error.value).startswith(str(whole) if case == "not json" else f"{whole}[1]")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("r.json", "{}", "got dict; expected a list"),
        ("r.json", "[]", "holds no record"),
        ("r.jsonl", "", "holds no record"),
        ("r.jsonl", "\n \n", "holds no record"),
        ("r.jsonl", b"\xff\xfe", "expected UTF-8"),
        ("r.jsonl", GOOD[:-10], ":1: "),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, content, expected):
    path = written(tmp_path, name, content)
    with pytest.raises(RecordError) as error:
        read_records(path)
    assert str(path) in str(error.value)
    assert expected in str(error.value)


def test_a_missing_file_and_another_kind_of_file_are_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, written(tmp_path, "r.txt", GOOD)):
        with pytest.raises(FileNotFoundError, match=rf"{path}.*expected \.jsonl or \.json"):
            read_records(path)


def test_a_crash_in_the_middle_of_a_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new" * 100_000 + "\ud800")  # a lone surrogate cannot be encoded
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.jsonl"]

    def crash(_):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.jsonl"]
    monkeypatch.undo()
    write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("name", "count", "with_meta"),
    [
        ("official_rot_train.sample.json", 6, 6),
        ("official_mat_train.sample.json", 6, 0),
        ("mat_trajectories.json", 47, 0),
    ],
)
def test_official_files_read_and_survive_a_round_trip(data_dir, tmp_path, name, count, with_meta):
    rows = read_records(data_dir / name)
    assert len(rows) == count
    assert sum("rot_meta" in r for r in rows) == with_meta
    for row in rows:
        assert {"id", "image", "answer", "conversations"} <= set(row)
        assert {m["role"] for m in row["conversations"]} <= {"system", "user", "assistant"}
        assert all(m["content"] for m in row["conversations"])
    write_records(tmp_path / "copy.jsonl", rows)
    assert read_records(tmp_path / "copy.jsonl") == rows
