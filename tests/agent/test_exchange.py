"""Records of others in and out again: nothing lost, every bad one named, the rest kept."""

import json
import os
from pathlib import Path

import pytest
from recorded_corpora import act, clean, mat, rot

from regrpo.cli import main
from regrpo.config import SourceConfig
from regrpo.data_engine.exchange import scan, to_normal, to_official
from regrpo.provenance import failure_provenance, provenance
from regrpo.records import RecordError, read_records, write_records
from regrpo.sft import load_trajectories

IMAGES = [{}, "a.jpg", {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}, ["a.jpg"], None]
SHAPES = {
    "rot": rot(),
    "clean": clean(),
    "from and value": mat("m", act("f()")),
    "human and gpt": {
        "conversations": [
            {"from": "human", "value": "Task", "weight": None},
            {"value": "x", "loss": 0, "from": "gpt"},
        ],
        "extra": {"deep": [1, {"a": None}]},
    },
    "role and value": {"id": 3, "conversations": [{"role": "user", "value": "Task"}]},
    **{f"image {i!r:.9}": {**clean(), "image": i} for i in IMAGES},
}


@pytest.fixture
def run(capsys):
    def run(*arguments):
        """What a `regrpo data` command prints, and the message it ends with."""
        message = None
        try:
            main(["data", *map(str, arguments)])
        except SystemExit as end:
            message = end.code
        return capsys.readouterr().out, message

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trips_are_exact(shape):
    raw = SHAPES[shape]
    normal = to_normal(json.loads(json.dumps(raw)), "here")
    for turn in normal["conversations"]:
        assert set(turn) == {"role", "content"}
    assert to_normal(to_official(normal), "elsewhere") == normal
    # What the source held comes back to the letter, the order of keys included.
    assert json.dumps(to_official(normal, turns="source")) == json.dumps(raw)
    if shape in ("rot", "clean") or shape.startswith("image"):
        assert json.dumps(to_official(normal)) == json.dumps(raw)
    else:
        assert all(
            set(turn) == {"role", "content"} for turn in to_official(normal)["conversations"]
        )


def test_turns_that_are_gone_cannot_be_restored(tmp_path, run):
    kept, cut = (to_normal(mat(name, act("f()")), "x") for name in ("kept", "cut"))
    del cut["conversations"][-1]
    write_records(tmp_path / "r.jsonl", [cut, kept])
    out, message = run(
        *("export", "--source", tmp_path / "r.jsonl", "--out", tmp_path / "o.jsonl"),
        *("--turns", "source"),
    )
    assert message is None
    assert "skipped record 'cut' has 2 turns; expected the 3 that were imported" in out
    assert [r["id"] for r in read_records(tmp_path / "o.jsonl")] == ["kept"]


def test_executed_records_survive_an_export(corpus, tmp_path, run):
    write_records(tmp_path / "rot.jsonl", corpus.rot[:5])
    built = read_records(tmp_path / "rot.jsonl")
    run("export", "--source", tmp_path / "rot.jsonl", "--out", tmp_path / "official.json")
    run("import", "--source", tmp_path / "official.json", "--out", tmp_path)
    assert read_records(tmp_path / "official.jsonl") == built
    assert {provenance(r) for r in built} == {failure_provenance(r) for r in built} == {"executed"}


def test_an_invented_failure_is_marked_as_a_teachers():
    assert (provenance(to_normal(clean(), "x")), failure_provenance(clean())) == ("recorded", None)
    told = to_normal(rot(), "x")
    assert (provenance(told), failure_provenance(told)) == ("teacher", "teacher")
    claimed = to_normal(rot(), "x", origin="recorded")
    assert (provenance(claimed), failure_provenance(claimed)) == ("recorded", "recorded")
    # What says where it comes from is believed.
    assert to_normal(claimed, "y") == claimed
    for block in (3, {"provenance": "guessed"}, {"failure": ["executed"]}):
        with pytest.raises(RecordError, match=r"^place: regrpo.* expected"):
            to_normal({**clean(), "regrpo": block}, "place")


BAD_LINES = {
    b'{"id": ': "expected JSON in UTF-8",
    b"\xff": "expected JSON in UTF-8",
    b"[1]": "got list; expected an object",
    b'{"id": "a"}': "conversations is None",
    b'{"conversations": [{"role": "user", "content": "\\ud800"}]}': "lone surrogate",
    b'{"n": ' + b"1" * 5000 + b"}": "4300 digits",
    b"[" * 100_000: "expected JSON in UTF-8",
}


def test_bad_lines_are_named_and_the_rest_is_kept(tmp_path, run):
    good = [json.dumps(r).encode() for r in (clean("a"), clean("b"))]
    path = tmp_path / "in" / "mixed.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join([good[0], b"", *BAD_LINES, good[1]]))
    missing, table = tmp_path / "none.json", tmp_path / "table.json"
    table.write_text("{}")
    out, message = run("import", "--source", path, missing, table, "--out", tmp_path / "out")
    lines = out.splitlines()
    assert "2 of the files could not be read" in message
    for line, expected in enumerate(BAD_LINES.values(), 3):
        (found,) = [text for text in lines if text.startswith(f"skipped {path}:{line}: ")]
        assert expected in found
    assert f"no data file at {missing}" in out
    assert f"{table}: got dict; expected a list" in out
    assert lines[-1] == f"{tmp_path / 'out'}: 2 imported, {len(BAD_LINES)} skipped"
    assert [r["id"] for r in read_records(tmp_path / "out" / "mixed.jsonl")] == ["a", "b"]
    report = json.loads((tmp_path / "out" / "import_report.json").read_text())
    assert report["files"] == {str(path): 2}
    assert len(report["skipped"]) == len(BAD_LINES)
    assert len(report["missing"]) == 2


@pytest.mark.parametrize("cut", [1, 30, 400, -1, -3])
def test_of_a_torn_list_the_whole_elements_are_kept(tmp_path, cut):
    rows = [clean(str(i)) for i in range(3)]
    text = json.dumps(rows, indent=1)
    path = tmp_path / "torn.json"
    path.write_text(text[:cut])
    values = [value for _, value in scan(path)]
    assert isinstance(values.pop(), RecordError)
    assert values == rows[: len(values)]
    assert len(values) == {1: 0, 30: 0, 400: 1, -1: 3, -3: 2}[cut]


def test_two_files_of_one_name_are_refused_before_anything_is_written(tmp_path, run):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "r.jsonl", [clean()])
    sources = [tmp_path / "a" / "r.jsonl", tmp_path / "b" / "r.jsonl"]
    _, message = run("import", "--source", *sources, "--out", tmp_path / "out")
    assert "two files have the same name" in message
    assert not (tmp_path / "out").exists()


def test_training_on_chosen_origins(tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    marked = [to_normal(r, "x") for r in (clean("a"), rot("b"))]
    write_records(path, [*marked, clean("c")])

    def load(*origins):
        source = SourceConfig(str(path), provenance=origins or None)
        trajectories, skipped = load_trajectories(tokenizer, [source], 10_000)
        return len(trajectories), dict(skipped)

    assert load() == (3, {})
    assert load("recorded") == (1, {"provenance teacher": 1, "provenance unknown": 1})
    assert load("recorded", "teacher") == (2, {"provenance unknown": 1})
    with pytest.raises(ValueError, match="no record to train on"):
        load("executed")
    for wrong in ((), ("made up",)):
        with pytest.raises(ValueError, match="provenance: got"):
            SourceConfig("x", provenance=wrong)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("official_rot_train.sample.json", 6),
        ("official_mat_train.sample.json", 6),
        ("mat_trajectories.json", 47),
    ],
)
def test_official_files_come_back_exactly(tmp_path, run, name, count):
    folder = os.environ.get("REGRPO_DATA_DIR")
    if not folder:
        pytest.skip("REGRPO_DATA_DIR is unset: no official records to read")
    path = Path(folder) / name
    turns = "source" if name.startswith("mat") else "official"
    out, message = run("import", "--source", path, "--out", tmp_path)
    assert message is None
    assert f"{count} imported, 0 skipped" in out
    imported, exported = tmp_path / f"{path.stem}.jsonl", tmp_path / "back.json"
    run("export", "--source", imported, "--out", exported, "--turns", turns)
    assert json.loads(exported.read_text()) == json.loads(path.read_text())
    assert run("verify", imported)[1] is None
