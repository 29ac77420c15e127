"""Every gate fires on what it is for and on nothing else, one line a problem."""

import copy
import json

import pytest
from PIL import Image
from recorded_corpora import act, clean, mat, rot, seen

from regrpo.cli import main
from regrpo.config import DataConfig, DataVerifyConfig, TaskConfig
from regrpo.data_engine.build import write_corpora
from regrpo.data_engine.verify import check_evidence, check_execution, shared_runs, verify_files
from regrpo.prompts import observation_turn, thought
from regrpo.records import read_records, write_records
from regrpo.tasks import VISION_FAMILIES
from regrpo.tool_calls import ToolCall, Turn
from regrpo.workspace import TextFile, file_to_dict


def changed(**paths):
    """A good record with some parts replaced; `a__0__b` is the path a, 0, b."""
    record = rot()
    for path, value in paths.items():
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("__")]
        target = record
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return record


GOOD = rot()
REFLECTING = GOOD["conversations"][4]["content"]
CORRECTED = GOOD["rot_meta"]["corrected_action"]
BAD = GOOD["rot_meta"]["failed_action"]
TWICE = "Thought: x\n\nCode:\nCode:\n```py\ninspect('receipt.pdf')\n```"

PROBLEMS = {
    "no answer": ({"answer": None}, ["schema"]),
    "no image": ({"image": None}, ["schema"]),
    "id": ({"id": 3}, ["schema"]),
    "meta text": ({"rot_meta__failed_observation": 3}, ["schema"]),
    "step": ({"rot_meta__step_index": "0"}, ["schema"]),
    "type": ({"rot_meta__error_type": "Oops"}, ["schema", "schema"]),
    "types differ": ({"rot_meta__error_type": "ToolMismatch"}, ["schema"]),
    "leak to a user turn": (
        {"conversations__1__content": 'Task: say inspect("receipt.pdf")'},
        ["label leak"],
    ),
    "leak to an earlier action": (
        {"conversations__1": {"role": "assistant", "content": act("inspect('receipt.pdf')")}},
        ["label leak"],
    ),
    "no corrected code": (
        {"rot_meta__corrected_action": "Thought: x\n\nCode:\n```py\n\n```"},
        ["empty corrected code"],
    ),
    "no block": ({"rot_meta__corrected_action": "Thought: x"}, ["empty corrected code"]),
    "doubled marker": (
        {
            "rot_meta__corrected_action": TWICE,
            "conversations__4__content": REFLECTING[: REFLECTING.index("Thought:")] + TWICE,
        },
        ["doubled code marker", "doubled code marker"],
    ),
    "same action": (
        {
            "rot_meta__failed_action": act("inspect( 'receipt.pdf' )  # again"),
            "conversations__2__content": act("inspect( 'receipt.pdf' )  # again"),
        },
        ["failed equals corrected"],
    ),
    "no reflection turn": ({"conversations__4__content": CORRECTED}, ["reflection turn missing"]),
    "another triplet": (
        {"conversations__4__content": REFLECTING.replace("use receipt.pdf", "read it")},
        ["reflection turn missing"],
    ),
    "acts otherwise": (
        {"conversations__4__content": REFLECTING.replace('"receipt.pdf"', '"other.pdf"')},
        ["reflection turn missing"],
    ),
    "failure not shown": (
        {"conversations__3__content": "[OUTPUT OF STEP 0] -> Observation:\nfine"},
        ["failure not before the reflection"],
    ),
    "no plan": (
        {
            "rot_meta__reflection__fix_plan": " ",
            "conversations__4__content": REFLECTING.replace("use receipt.pdf", ""),
        },
        ["empty trained span"],
    ),
    "ungrounded": (
        {
            "rot_meta__reflection__evidence": "it went wrong",
            "conversations__4__content": REFLECTING.replace(
                GOOD["rot_meta"]["reflection"]["evidence"], "it went wrong"
            ),
        },
        ["ungrounded evidence"],
    ),
    "what the failed call said already": (
        {
            "rot_meta__reflection__evidence": "it was recit.pdf",
            "conversations__4__content": REFLECTING.replace(
                GOOD["rot_meta"]["reflection"]["evidence"], "it was recit.pdf"
            ),
        },
        ["no rare span"],
    ),
}


def verify(tmp_path, *files):
    paths = []
    for index, records in enumerate(files):
        paths.append(str(tmp_path / f"{index}.jsonl"))
        write_records(paths[-1], records)
    return verify_files(DataVerifyConfig(paths))


def checks(report):
    return [line.split("): ")[1].split(":")[0] for line in report.lines if "): " in line]


def test_good_records_pass(tmp_path):
    report = verify(tmp_path, [rot("a"), clean("b")], [mat("c", act("f()"), seen(0, "x"))])
    assert report.problem is None
    assert report.lines == ["3 records in 2 files; 0 of 0 executed ones were executed again"]


@pytest.mark.parametrize("case", PROBLEMS)
def test_each_check(tmp_path, case):
    paths, expected = PROBLEMS[case]
    report = verify(tmp_path, [changed(**paths)])
    assert checks(report) == expected, report.lines
    assert report.problem == f"{len(expected)} problems"


def test_an_assistant_that_says_nothing(tmp_path):
    silent = clean()
    silent["conversations"][2]["content"] = " \n"
    assert checks(verify(tmp_path, [silent])) == ["empty trained span"]


def test_ids_are_compared_across_files(tmp_path):
    report = verify(tmp_path, [clean("a"), clean("b"), clean("a")], [clean("b")])
    assert checks(report) == ["duplicate id"] * 2
    assert f"{tmp_path / '0.jsonl'}:3 (a): duplicate id: is also at {tmp_path / '0.jsonl'}:1" in (
        report.lines
    )
    assert f"{tmp_path / '1.jsonl'}:1 (b): duplicate id: is also at {tmp_path / '0.jsonl'}:2" in (
        report.lines
    )


def test_common_words_of_a_corpus_are_no_evidence():
    def failure(name, observed, evidence):
        told = {"error_type": "ArgInvalid", "evidence": evidence, "fix_plan": "x"}
        return name, rot(name, failed_observation=observed, reflection=told)

    common = [failure(f"c{i}", f"lookup failed badly\npage {i}77", f"page {i}77") for i in range(9)]
    lazy = failure("lazy", "lookup failed badly\npage 5", "it says lookup failed badly")
    found = list(check_evidence([*common, lazy], 0.05))
    assert [(p.id, p.check) for p in found] == [("lazy", "no rare span")]
    others = [failure(f"f{i}", f"nobody at {i}33", f"at {i}33") for i in range(9)]
    assert list(check_evidence([*common, *others, lazy], 0.4)) != []
    assert list(check_evidence([*common, *others, lazy], 0.6)) == []
    # There is nothing else to cite here, however common it is.
    whole = [failure(f"w{i}", "lookup failed badly", "lookup failed badly") for i in range(9)]
    others = [failure(f"o{i}", f"lookup failed badly {i}", "lookup failed badly") for i in range(9)]
    found = list(check_evidence([*whole, *others], 0.05))
    assert [p.id for p in found] == [f"o{i}" for i in range(9)]


def test_shared_runs():
    assert shared_runs(list("abcxb"), list("bcab")) == {
        ("a", "b"), ("b", "c"), ("b",),
    }  # fmt: skip
    assert shared_runs([], ["a"]) == set()


def test_what_was_executed_is_executed_again(corpus, environment, tmp_path):
    records = json.loads(json.dumps([*corpus.rot[:8], *corpus.success[:8]]))
    places = [(str(i), r) for i, r in enumerate(records)]
    assert list(check_execution(environment, places, tmp_path)) == []

    def problems(change):
        record = copy.deepcopy(records[0])
        change(record)
        found = list(check_execution(environment, [("here", record), *places[1:]], tmp_path))
        assert {p.where for p in found} <= {"here"}
        return [f"{p.check}: {p.message}" for p in found]

    def forget(record):
        del record["regrpo"]["workspace"]

    assert problems(forget) == []
    meta = records[0]["rot_meta"]

    def swap(record):
        record["rot_meta"]["failed_action"] = meta["corrected_action"]
        record["rot_meta"]["corrected_action"] = meta["failed_action"]

    succeeds, fails = problems(swap)
    assert succeeds.startswith("executed again: the failed action succeeds: ")
    assert fails.startswith("executed again: the corrected action fails: ")

    def lie(record):
        record["conversations"][3]["content"] += "!"

    (line,) = problems(lie)
    assert line.startswith("executed again: turn 2 gives ")

    def call_nobody(record):
        record["conversations"][2]["content"] = act('ask_someone("x")')

    (line,) = problems(call_nobody)
    assert "name 'ask_someone' is not defined" in line
    for files, expected in (
        (3, "must be a list"),
        ([{"kind": "tape"}], "kind must be one of"),
        ([{"kind": "text", "path": "../x", "content": ""}], "stay in the workspace"),
        ([{"kind": "sqlite", "path": "a.db", "script": "SELEC"}], "script of 'a.db' fails"),
    ):
        (line,) = problems(lambda record, files=files: record["regrpo"].update(workspace=files))
        assert line.startswith("workspace: ")
        assert expected in line


def test_pictures_are_executed_again(environment, tmp_path):
    tasks = TaskConfig(seed=3, families=VISION_FAMILIES)
    write_corpora(DataConfig(str(tmp_path), count=30, tasks=tasks), environment)
    files = [tmp_path / f"{name}.jsonl" for name in ("success", "rot")]
    for path in files:
        records = [(str(i), r) for i, r in enumerate(read_records(path))]
        assert any(len(r["image"]) == 2 for _, r in records) == (path.stem == "rot")
        assert list(check_execution(environment, records, tmp_path)) == []
    record = read_records(files[1])[0]
    last = list(record["image"])[-1]
    name = record["image"][last]

    def problems(record):
        found = list(check_execution(environment, [("here", record)], tmp_path))
        return [f"{p.check}: {p.message}" for p in found]

    path = tmp_path / name
    with Image.open(path) as picture:
        width, height = picture.size
        picture.convert("RGB").save(path, format="PNG", compress_level=9)
    assert problems(record) == [], "the same pixels in another file"
    Image.new("RGB", (width, height), "white").save(path)
    (line,) = problems(record)
    assert line.endswith(f"shows another picture than {name}")
    for content in (b"no picture", None):
        path.write_bytes(content) if content else path.unlink()
        (line,) = problems(record)
        assert line.endswith(f"has no picture at {name}")
    unshown = copy.deepcopy(record)
    for message in unshown["conversations"]:
        message["content"] = message["content"].replace(f"\n{last}", "")
    (line,) = problems(unshown)
    assert line.endswith("shows a picture, and the record none")


def test_text_that_looks_like_a_placeholder_is_executed_again(environment, tmp_path):
    files = (TextFile("oak.txt", "see <image_00>"),)
    call = Turn(None, thought("read_file"), ToolCall("read_file", ("oak.txt",))).render()
    (seen,) = environment.execute([(files, call)])
    record = clean("a") | {
        "image": {"<image_00>": "none.png"},
        "conversations": [
            {"role": "user", "content": "Task: What is in oak.txt?"},
            {"role": "assistant", "content": call},
            {"role": "user", "content": observation_turn(0, seen.text)},
        ],
        "regrpo": {"provenance": "executed", "workspace": [file_to_dict(f) for f in files]},
    }
    assert list(check_execution(environment, [("here", record)], tmp_path)) == []


def test_the_commands_on_files_that_are_good_bad_and_missing(corpus, tmp_path, capsys):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    write_records(good, [*corpus.rot[:30], *corpus.success[:10]])
    main(["data", "verify", str(good)])
    printed = "40 records in 1 files; 40 of 40 executed ones were executed again\n"
    assert capsys.readouterr().out == printed
    main(["data", "verify", str(good), "--execute", "false"])
    assert "0 of 40 executed ones" in capsys.readouterr().out
    write_records(bad, [clean("a"), rot("b")])
    with bad.open("a") as handle:
        handle.write("{torn")
    with pytest.raises(SystemExit) as end:
        main(["data", "verify", str(bad), str(tmp_path / "none.jsonl")])
    assert end.value.code == "regrpo data verify: 2 problems"
    out = capsys.readouterr().out
    assert f"no data file at {tmp_path / 'none.jsonl'}" in out
    assert f"{bad}:3: " in out
    assert "2 records in 1 files" in out


def test_stats(corpus, tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "mixed.jsonl"
    write_records(path, [*corpus.rot[:8], clean("a"), rot("b"), mat("c", act("f()"), seen(0, "x"))])
    main(["data", "stats", str(path), "--tokenizer", str(tmp_path / "tokenizer")])
    lines = capsys.readouterr().out.splitlines()
    for expected in (
        "11 records, 11 ids",
        "  9 rot",
        "  2 clean",
        "  8 executed",
        "  2 recorded",
        "  1 teacher",
        "  8 grounded",
        "  1 f",
        "  2 inspect",
    ):
        assert expected in lines
    shares = [line for line in lines if line.endswith((", 0.294", ", 0.246", ", 0.308", ", 0.152"))]
    assert len(shares) == 4
    assert sum(int(line.split()[0]) for line in shares) == 9
    for name in ("turns", "characters a record", "characters a reflection", "tokens a record"):
        assert any(line.startswith(f"{name}: median ") for line in lines)
    assert any(line.startswith("observations: ") and line.endswith(" unique") for line in lines)
