"""What counts as a natural recovery, and what a record makes of it; replay of what was recorded."""

import json
from pathlib import Path

import pytest
from recorded_corpora import PARSING, RAISED, act, failed, mat, rot, seen

from regrpo.cli import main
from regrpo.data_engine.exchange import to_normal
from regrpo.data_engine.mining import complete, error_type, mine
from regrpo.data_engine.recorded import (
    code_of,
    failed_turns,
    observation,
    official_layout,
    sole_call,
    tool_calls,
)
from regrpo.data_engine.replay import ReplayEnvironment
from regrpo.data_engine.verify import Observations, check_evidence, check_record
from regrpo.records import read_records
from regrpo.segments import Segment, tokenize_conversation
from regrpo.sft import trained_turns
from regrpo.tool_calls import Reflection, ToolCall
from regrpo.tools import Status

ANSWER = act('final_answer("tulip")')
LOCATE = 'boxes = locate("flower", "garden.jpg")\nprint(boxes)'
LOOK = 'seen = look("which flower?", "garden.jpg")\nprint(seen)'


@pytest.mark.parametrize(
    ("turn", "kind", "text"),
    [
        ("[OUTPUT OF STEP 2] -> Observation:\n 7\n", "ok", " 7\n"),
        ("[OUTPUT OF STEP 2] Observation:\nno error was found", "ok", "no error was found"),
        ("[OUTPUT OF STEP 2] Observation:\nresult: Error: none", "ok", "result: Error: none"),
        (seen(2, "[]"), "empty", "[]\n"),
        (seen(2, ""), "empty", "\n"),
        (failed(2, RAISED + "bad axis"), "execution", "bad axis"),
        (failed(2, RAISED + "Error code: 429 - wait"), "service", "Error code: 429 - wait"),
        (failed(2, RAISED + "Error code: 404 - gone"), "execution", "Error code: 404 - gone"),
        (failed(2, PARSING), "format", PARSING.partition("\n")[2]),
        ("[OUTPUT OF STEP 2] Observation:\nKeyError: 'a'", "execution", "KeyError: 'a'"),
        (seen(2, "x\nTraceback (most recent call last):\n  a"), "execution", None),
    ],
)  # fmt: skip
def test_observations_are_typed_by_what_the_harness_and_python_say(turn, kind, text):
    found = observation(turn)
    assert (found.step, found.kind) == (2, kind)
    assert text is None or found.text == text
    status = {"ok": Status.OK, "empty": Status.EMPTY}.get(kind, Status.ERROR)
    assert found.status is status


def test_calls_in_blocks_of_code():
    code = (
        "import os\nq = 'roses'\nfor x in rows:\n    print(ask(q, n=2), look(x), os.path.join(q))"
    )
    assert tool_calls(code) == [ToolCall("ask", ("roses",), {"n": 2}), ToolCall("look", ("x",))]
    assert tool_calls("helper(1)", frozenset({"helper"})) == []
    assert tool_calls("not python (") == []
    ask = ToolCall("ask", ("a",), {"n": [1]})
    for code in ("ask('a', n=[1])", 'print(ask("a", n=[1]))', "r = ask('a', n=[1])\nprint(r)"):
        assert sole_call(code) == ask
    for code in ("r = ask('a')\nprint('R:', r)", "ask(x)", "ask('a')\nask('b')", "print(3)", "(("):
        assert sole_call(code) is None
    assert code_of("Code:\n```py\nx = '```'\nask(x)\n```<end_action>") == "x = '```'\nask(x)"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (ToolCall("a", ("x",)), ToolCall("b", ("x",)), "ToolMismatch"),
        (ToolCall("a", ("x",)), ToolCall("a", ("x",), {"city": "y"}), "InfoInsufficient"),
        (ToolCall("a", ("x", [1, 2])), ToolCall("a", ("x", [3, 4])), "GroundingDrift"),
        (ToolCall("a", ("x", 1)), ToolCall("a", ("y", 1)), "ArgInvalid"),
        (ToolCall("a", ("x", True)), ToolCall("a", ("x", False)), "ArgInvalid"),
    ],
)
def test_the_type_of_a_mistake_follows_from_its_correction(before, after, expected):
    assert error_type(before, after) == expected


CASES = {
    "other tool": (LOCATE, seen(0, "[]"), LOOK, "other tool", "mined"),
    "raised": (LOCATE, failed(0, RAISED + "no model for flowers"), LOOK, "other tool", "mined"),
    "renamed": (
        'print(ask("roza"))', failed(0, RAISED + "no page roza\nsee rosa"),
        'print(ask("rosa"))', "same tool", "mined",
    ),
    "the fix is not told": (
        'print(ask("roza"))', failed(0, RAISED + "no page"),
        'print(ask("rosa"))', "same tool", "pending",
    ),
    "argument unknown": (
        "print(ask(x))", failed(0, RAISED + "no page"), "print(ask(y))", "same tool", "pending",
    ),
    "service": (
        'ask("a")', failed(0, RAISED + "Error code: 429"), 'ask("b")', "same tool", None,
    ),
    "made up": (
        LOCATE, failed(0, RAISED + "no model"), 'print("a tulip")', "went on without a tool", None,
    ),
    "repeated": (LOCATE, failed(0, RAISED + "busy"), LOCATE + "  # again", "repeated", None),
    "another subject": (
        LOCATE, failed(0, RAISED + "busy"), 'ask("flowers")', "another call on another subject",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_recoveries(case):
    before, text, after, outcome, kept = CASES[case]
    raw = mat("m", act(before), text, act(after, bold=True), seen(1, "a tulip"), ANSWER)
    mined, pending, (failure,) = mine([to_normal(raw, "x")])
    assert (failure.turn, failure.outcome) == (2, outcome)
    assert (len(mined), len(pending)) == (kept == "mined", kept == "pending")


def test_a_step_that_fails_again_or_ends_a_wrong_trajectory_repairs_nothing():
    twice = mat(
        "m", act(LOCATE), failed(0, RAISED + "a"), act(LOOK), failed(1, RAISED + "b"), ANSWER
    )
    _, _, failures = mine([to_normal(twice, "x")])
    assert [f.outcome for f in failures] == [
        "the next step fails as well",
        "went on without a tool",
    ]
    wrong = mat("m", "Final Answer: tulip", failed(0, PARSING), ANSWER, correct="no")
    assert mine([to_normal(wrong, "x")])[:2] == ([], [])
    open_end = mat("m", act(LOCATE), failed(0, RAISED + "a"))
    assert [f.outcome for f in mine([to_normal(open_end, "x")])[2]] == ["the trajectory ends"]
    assert mine([to_normal(rot(), "x")]) == ([], [], [])


def test_a_mined_record_passes_the_gates_and_trains_its_reflection(tokenizer):
    before, text, after, *_ = CASES["renamed"]
    later = [act(LOCATE), failed(2, RAISED + "no model"), act(LOOK), seen(3, "x"), ANSWER]
    raw = mat("m", act(before), text, act(after, bold=True), seen(1, "a rose"), *later)
    (record, second), _, _ = mine([to_normal(raw, "x")])
    assert (record["id"], second["id"]) == ("m_rot2", "m_rot6")
    meta = record["rot_meta"]
    assert meta["reflection"] == {
        "error_type": "ArgInvalid", "evidence": "see rosa", "fix_plan": "use rosa"
    }  # fmt: skip
    assert meta["failed_observation"] == "no page roza\nsee rosa"
    assert record["regrpo"] == {
        "provenance": "recorded",
        "failure": "recorded",
        "mined": {"kind": "execution", "relation": "same tool"},
    }
    assert record["image"] == raw["image"]
    assert check_record(record) == []
    assert list(check_evidence([("a", record), ("b", second)], 0.05)) == []
    # The other failure is in nobody's future; the turn reads as the official ones do.
    assert len(record["conversations"]) == 5
    told = Reflection(**meta["reflection"]).render()
    assert record["conversations"][4]["content"] == told + meta["corrected_action"]
    assert trained_turns(record, "rot") == [4]
    assert trained_turns(second, "repair") == [4, 8, 10]
    tokens = tokenize_conversation(tokenizer, record["conversations"], trained_turns=[4])
    assert tokens.count(Segment.REFLECTION) > 0
    assert tokens.count(Segment.ACTION) > 0


def test_a_teacher_completes_what_is_pending():
    raw = mat("m", "Final Answer: a tulip", failed(0, PARSING), ANSWER)
    mined, (pending,), _ = mine([to_normal(raw, "x")])
    assert mined == []
    assert "rot_meta" not in pending
    assert pending["regrpo"]["pending"]["kind"] == "format"
    told = Reflection("NonCommit", "The code blob is invalid", "answer in a code block")
    record = complete(pending, told)
    assert check_record(record) == []
    assert record["rot_meta"]["src_id"] == "m"
    assert "pending" not in record["regrpo"]
    assert "pending" in pending["regrpo"]


def test_turns_that_a_harness_refused_are_not_trained_as_repairs():
    raw = mat("m", "no code", failed(0, PARSING), act(LOCATE), seen(1, "[]"), ANSWER)
    record = to_normal(raw, "x")
    assert failed_turns(record["conversations"]) == [2]
    assert trained_turns(record, "repair") == [4, 6]
    assert trained_turns(record, "clean") == [2, 4, 6]


def test_the_command_writes_what_it_reports(tmp_path, capsys):
    cases = [CASES[name] for name in ("other tool", "the fix is not told", "made up")]
    rows = [
        mat(f"m{i}", act(a), text, act(b), seen(1, "x"), ANSWER)
        for i, (a, text, b, *_) in enumerate(cases)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{torn")
    main(["data", "mine", "--source", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    assert "3 failures in 3 records, 2 repaired: 1 mined, 1 pending" in out
    assert "1 execution: went on without a tool" in out
    assert f"skipped {tmp_path / 't.jsonl'}:4: " in out
    assert [r["id"] for r in read_records(tmp_path / "o" / "mined.jsonl")] == ["m0_rot2"]
    assert [r["id"] for r in read_records(tmp_path / "o" / "pending.jsonl")] == ["m1_rot2"]
    report = json.loads((tmp_path / "o" / "mine_report.json").read_text())
    assert [f["outcome"] for f in report["failures"]] == [c[3] for c in cases]


def test_replay_answers_what_was_recorded_and_nothing_else():
    several = "a = ask('x')\nprint('A:', a)"
    raw = mat("m", act(LOCATE), seen(0, "[]"), act(several), seen(1, "A: 3"), ANSWER)
    record, other = to_normal(raw, "x"), to_normal(rot(), "x")
    environment = ReplayEnvironment({Path("m"): record, Path("r"): other})
    ask = [
        (Path("m"), act('locate("flower", "garden.jpg")')),
        (Path("m"), act("a = ask('x')  # why\n\nprint('A:',a)")),
        (Path("r"), other["rot_meta"]["failed_action"]),
        (Path("r"), other["rot_meta"]["corrected_action"]),
        (Path("r"), act('locate("flower", "garden.jpg")')),
        (Path("m"), act("ask('x')")),
        (Path("m"), "no code"),
        (Path("r"), act('final_answer("7")')),
    ]
    seen_ = environment.execute(ask)
    assert [o.status.value for o in seen_] == [
        "empty", "ok", "error", "ok", "error", "error", "error", "ok"
    ]  # fmt: skip
    assert [o.text for o in seen_[:4]] == [
        "[]\n", "A: 3\n", other["rot_meta"]["failed_observation"], "total 7"
    ]  # fmt: skip
    assert all(o.provenance == "recorded" for o in seen_[:4])
    assert seen_[4].text == "NotRecordedError: locate was not recorded with these arguments"
    assert seen_[5].text == "NotRecordedError: ask was not recorded with these arguments"
    assert seen_[7].text == "7"
    with pytest.raises(KeyError):
        environment.execute([(Path("nobody"), act("f()"))])


def test_a_failure_that_no_exception_shows_is_replayed_as_a_failure():
    quiet = to_normal(rot(failed_observation="the crop shows pavement"), "x")
    (found,) = ReplayEnvironment({Path("r"): quiet}).execute(
        [(Path("r"), quiet["rot_meta"]["failed_action"])]
    )
    assert (found.text, found.status) == ("the crop shows pavement", Status.ERROR)


def test_the_layout_of_a_turn_is_made_official():
    turn = "First, prose.\n\n**Thought:** look\n\n**Code:**\n```python\nf(1)\n```<end_action>"
    assert official_layout(turn) == "Thought: First, prose.\n\nlook\n\nCode:\n```py\nf(1)\n```"
    with pytest.raises(ValueError, match="no fenced code block"):
        official_layout("Final Answer: 3")
    assert len(Observations(["a b", "a b", "c"])) == 2
