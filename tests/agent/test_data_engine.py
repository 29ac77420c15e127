"""The data engine, executed: gates, grounding, schema, determinism."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from regrpo.config import DataConfig, TaskConfig
from regrpo.data_engine import build as engine
from regrpo.data_engine.build import build, demonstrate, local_starts, write_corpora
from regrpo.data_engine.near_miss import ERROR_SHARES, near_misses
from regrpo.data_engine.teacher import explain
from regrpo.environment import LocalEnvironment
from regrpo.records import RecordError, read_records
from regrpo.tasks import Step, Task, generate_tasks
from regrpo.tool_calls import ToolCall, parse_turn
from regrpo.tools import Status
from regrpo.workspace import TextFile

META_KEYS = [
    "src_id",
    "step_index",
    "error_type",
    "failed_action",
    "failed_observation",
    "reflection",
    "corrected_action",
    "final_answer",
]


def small_task(*steps):
    """A task on two files, with the calls given."""
    files = (TextFile("oak.txt", "number 7"), TextFile("pine.txt", "number 8"))
    calls = [*steps, Step(ToolCall("final_answer", ("7",)))]
    return Task("t", "links", "What is the number in oak.txt?", "7", files, tuple(calls))


def test_a_near_miss_that_does_not_fail_is_dropped(environment):
    working = ToolCall("read_file", ("pine.txt",))
    task = small_task(Step(ToolCall("read_file", ("oak.txt",)), working, "ArgInvalid"))
    (demo,), dropped = demonstrate(environment, [task], seed=0)
    assert demo.failures == ()
    assert dropped == {"near-miss did not fail": 1}
    corpus = build(environment, [task], seed=0)
    assert (len(corpus.success), len(corpus.clean), len(corpus.rot)) == (1, 0, 0)


def test_a_repair_that_the_observation_does_not_tell_is_dropped(environment):
    # `lost` is nowhere, and nothing says that the calculation was meant to be 3 + 4.
    task = small_task(
        Step(ToolCall("calculator", ("3 + 4",)), ToolCall("calculator", ("1 / 0",)), "ArgInvalid")
    )
    (demo,), dropped = demonstrate(environment, [task], seed=0)
    assert demo.failures == ()
    assert dropped == {"repair not in the observation": 1}


def test_a_reference_call_that_fails_is_an_error(environment):
    task = small_task(Step(ToolCall("read_file", ("gone.txt",))))
    with pytest.raises(RuntimeError, match=r'task t: reference call read_file\("gone.txt"\) gave'):
        demonstrate(environment, [task], seed=0)


def test_every_kept_failure_fails_and_its_correction_succeeds_when_run_again(environment, corpus):
    tasks = {t.id: t for t in generate_tasks(96, seed=11, hops=(1, 4))}
    assert len(corpus.rot) > 40
    metas = [r["rot_meta"] for r in corpus.rot]
    files = [tasks[m["src_id"]].workspace for m in metas]
    failed = environment.execute(
        [(f, m["failed_action"]) for f, m in zip(files, metas, strict=True)]
    )
    corrected = environment.execute(
        [(f, m["corrected_action"]) for f, m in zip(files, metas, strict=True)]
    )
    for meta, bad, good in zip(metas, failed, corrected, strict=True):
        assert bad.status is not Status.OK
        assert bad.text == meta["failed_observation"]
        assert good.status is Status.OK


def test_evidence_is_literally_in_the_observation_or_a_path_of_edges_that_are(corpus):
    paths = 0
    for record in corpus.rot:
        meta = record["rot_meta"]
        evidence, observation = meta["reflection"]["evidence"], meta["failed_observation"]
        if evidence in observation:
            continue
        names = evidence.split(" -> ")
        assert len(names) > 2, (evidence, observation)
        for edge in pairwise(names):
            line = rf"^\W*{re.escape(' -> '.join(edge))}$"
            assert re.search(line, observation, re.MULTILINE), (evidence, observation)
        paths += 1
        # The path runs from what was wrong to what is used instead.
        assert names[0] in meta["failed_action"]
        assert names[-1] in meta["corrected_action"]
        assert meta["reflection"]["fix_plan"] == f"use {names[-1]}"
    assert paths > 10


def test_records_have_the_official_schema(corpus):
    ids = [r["id"] for r in [*corpus.success, *corpus.rot]]
    assert len(set(ids)) == len(ids)
    assert {r["id"] for r in corpus.clean} <= {r["id"] for r in corpus.success}
    for record in [*corpus.success, *corpus.rot]:
        roles = [m["role"] for m in record["conversations"]]
        assert roles == [
            "system",
            "user",
            "assistant",
            *["user", "assistant"] * (len(roles) // 2 - 1),
        ]
        last = parse_turn(record["conversations"][-1]["content"]).call
        assert last == ToolCall("final_answer", (record["answer"],))
        assert record["image"] == {}
    for record in corpus.rot:
        meta = record["rot_meta"]
        assert list(meta) == META_KEYS
        turns = [m["content"] for m in record["conversations"]]
        at = turns.index(meta["failed_action"])
        observation = f"[OUTPUT OF STEP {meta['step_index']}] -> Observation:\n"
        assert turns[at + 1] == observation + meta["failed_observation"]
        # The reflection turn comes right behind the failure, and the correction not before it.
        turn = parse_turn(turns[at + 2])
        assert vars(turn.reflection) == meta["reflection"]
        assert turn.call == parse_turn(meta["corrected_action"]).call
        assert turn.reflection.error_type == meta["error_type"]
        assert turn.call != parse_turn(meta["failed_action"]).call
        assert turns[at + 3].startswith(f"[OUTPUT OF STEP {meta['step_index']}]")


def test_corpora_differ_in_failures_only(corpus, tasks):
    trapped = {t.id for t in tasks if t.trapped}
    assert {r["id"] for r in corpus.success} == {t.id for t in tasks}
    assert {r["id"] for r in corpus.clean} == {t.id for t in tasks} - trapped
    assert trapped <= {r["rot_meta"]["src_id"] for r in corpus.rot}
    for record in corpus.success:
        assert not any("Reflection:" in m["content"] for m in record["conversations"][1:])


def test_all_error_types_come_up_and_the_forced_ones_follow_the_target_shares(environment):
    families = ("layout", "layout", "renames", "formats")  # boxes in half of them
    tasks = generate_tasks(240, seed=3, trap_share=0.0, families=families)
    corpus = build(environment, tasks, seed=0, near_miss_share=1.0)
    counts = Counter(r["rot_meta"]["error_type"] for r in corpus.rot)
    assert set(counts) == set(ERROR_SHARES)
    for name, share in ERROR_SHARES.items():
        assert counts[name] / len(corpus.rot) == pytest.approx(share, abs=0.03), counts


def test_write_corpora_is_the_same_byte_for_byte_and_reports_shares(tmp_path, environment):
    def write(name, environment):
        out = tmp_path / name
        config = DataConfig(out=str(out), count=48, tasks=TaskConfig(seed=21))
        return write_corpora(config, environment).replace(str(out), "OUT"), out

    first, one = write("one", environment)
    with LocalEnvironment() as other:
        second, two = write("two", other)
    assert first == second
    for name in ("success", "clean", "rot"):
        assert (one / f"{name}.jsonl").read_bytes() == (two / f"{name}.jsonl").read_bytes()
        assert read_records(one / f"{name}.jsonl")
    for name in ERROR_SHARES:
        assert re.search(rf"{name}: 0\.\d{{3}} \(target 0\.\d{{3}}\)", first)


def test_an_interrupted_write_leaves_no_torn_corpus(tmp_path, environment, monkeypatch):
    config = DataConfig(out=str(tmp_path), count=16, tasks=TaskConfig(seed=21))
    write_corpora(config, environment)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"config.json", "success.jsonl", "clean.jsonl", "rot.jsonl"}
    broken = ["ok", {"conversations": object()}]

    def unserialisable(*args, **kwargs):
        return engine.Corpus(success=broken, clean=broken, rot=broken)

    monkeypatch.setattr(engine, "_corpus", unserialisable)
    with pytest.raises(TypeError):
        write_corpora(config, environment)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    (tmp_path / "rot.jsonl").write_bytes(before["rot.jsonl"][:-9])
    with pytest.raises(RecordError, match=r"rot\.jsonl:\d+: "):
        read_records(tmp_path / "rot.jsonl")


def test_local_starts(demonstrations):
    starts = local_starts(demonstrations, random.Random(0), forced_share=0.5)
    assert [s.task for s in starts] == [d.task for d in demonstrations]
    assert starts == local_starts(demonstrations, random.Random(0), forced_share=0.5)
    assert 0.3 < sum(s.failed for s in starts) / len(starts) < 0.7
    for start, demo in zip(starts, demonstrations, strict=True):
        assert start.messages[-1]["role"] == "user"
        assert start.expected == demo.observations[start.step].text
        if not start.failed:
            assert start.error_type is None
            continue
        failure = next(
            f
            for f in demo.failures
            if (f.step, f.error_type) == (start.step, start.error_type)
            and f.observation.text in start.messages[-1]["content"]
        )
        assert parse_turn(start.messages[-2]["content"]).call == failure.call
    # Earlier steps went through the traps of the wording, repaired.
    behind = [s for s in starts if s.step and s.task.steps[0].trap is not None]
    assert behind
    for start in behind:
        calls = [parse_turn(m["content"]).call for m in start.messages if m["role"] == "assistant"]
        assert calls[:2] == [start.task.steps[0].trap, start.task.steps[0].call]
    assert not any(s.failed for s in local_starts(demonstrations, random.Random(0), forced_share=0))


def test_the_only_near_miss_of_a_trapped_step_is_its_trap(tasks):
    for task in tasks:
        for step in task.steps:
            misses = near_misses(step, random.Random(0))
            assert all(call != step.call or kind == "ArgInvalid" for kind, call in misses.items())
            if step.trap is not None:
                assert misses == {step.trap_type: step.trap}
            elif step.call.name == "final_answer":
                assert misses == {}
            else:
                assert set(misses) <= set(ERROR_SHARES)
                assert misses


@pytest.mark.parametrize(
    ("failed", "observation", "corrected", "evidence"),
    [
        ("a.txt", "OSError: x\na.txt -> b.txt\nb.txt -> c.txt", "c.txt", "a.txt -> b.txt -> c.txt"),
        ("a.txt", "OSError: x\nb.txt\na.csv", "a.csv", "a.csv"),
        ("a.txt", "OSError: x\naa.csv\nb.txt", "a.csv", None),  # no part of a longer name
        ("a.txt", "OSError: x\na.txt -> b.txt\nb.txt -> a.txt\nc.txt -> d.txt", "z.txt", None),
    ],
)  # fmt: skip
def test_explain(failed, observation, corrected, evidence):
    calls = (ToolCall("read_file", (name,)) for name in (failed, corrected))
    wrong, right = calls
    reflection = explain("ArgInvalid", wrong, observation, right)
    assert (reflection and reflection.evidence) == evidence


@pytest.mark.parametrize(("failed", "corrected"), [(["a.txt"], "b.txt"), ("b.txt", ["a.txt"])])
def test_an_argument_of_the_wrong_type_is_told_by_the_error(failed, corrected):
    """Also where the second call is the one that is wrong, as in contrastive groups."""
    wrong, right = ToolCall("read_file", (failed,)), ToolCall("read_file", (corrected,))
    reflection = explain("ArgInvalid", wrong, "TypeError: must be str\nb.txt", right)
    assert reflection.evidence == "TypeError: must be str"


def test_records_are_plain_json(corpus):
    for record in corpus.rot:
        assert json.loads(json.dumps(record)) == record
