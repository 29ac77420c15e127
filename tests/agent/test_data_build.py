"""`regrpo data build`: killed anywhere, given again, refused, with an endpoint as the teacher."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
from endpoint import Endpoint, answer, status

from regrpo.cli import main
from regrpo.config import DataConfig, TaskConfig, TeacherConfig
from regrpo.data_engine import build as engine
from regrpo.data_engine.build import write_corpora
from regrpo.errors import RunError
from regrpo.journal import Journal
from regrpo.records import read_records

FILES = ("success.jsonl", "clean.jsonl", "rot.jsonl")

# Builds, and kills itself behind so many bytes, or when so many lines are written, of what it
# writes last.
CHILD = """
import json, os, signal, sys
from regrpo import journal, records
from regrpo.config import DataConfig, TaskConfig, TeacherConfig
from regrpo.data_engine import build
from regrpo.environment import LocalEnvironment

fields, where, count = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
build.CHUNK = 8

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Torn(journal.Journal):
    left = count
    def append(self, entry):
        if not os.path.basename(self._file.name).startswith(where):
            return super().append(entry)
        if Torn.left == 0:
            line = json.dumps(entry).encode()
            self._file.write(line[: len(line) // 2])
            self._file.flush()
            die()
        Torn.left -= 1
        super().append(entry)

build.Journal = Torn
if where == "files":
    replace = os.replace
    def replaced(source, target):
        global count
        if str(target).endswith("l"):  # the corpora
            count -= 1
            if count < 0:
                die()
        replace(source, target)
    records.os.replace = replaced
if where == "end":
    unlink = build.Path.unlink
    build.Path.unlink = lambda *a, **k: die()
fields["tasks"] = TaskConfig(**fields["tasks"])
fields["teacher"] = TeacherConfig(**fields["teacher"])
with LocalEnvironment() as environment:
    print(build.write_corpora(DataConfig(**fields), environment))
"""


def config(out, **fields):
    return DataConfig(**{"out": str(out), "count": 24, "tasks": TaskConfig(seed=21), **fields})


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 8)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def killed(configuration, where, count):
    """Runs the build in a process that ends by SIGKILL."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asdict(configuration)), where, str(count)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


class Counting:
    """An environment that counts batches."""

    def __init__(self, environment):
        self.environment = environment
        self.batches = 0

    def execute(self, requests):
        self.batches += 1
        return self.environment.execute(requests)


@pytest.mark.parametrize(
    ("kills", "batches"),
    [
        ([("executed", 0)], 3),
        ([("executed", 1), ("executed", 1), ("files", 1)], 0),
        ([("end", 0)], 0),
    ],
    ids=["first", "thrice", "end"],
)
def test_killed_anywhere_and_given_again_is_the_same_corpus(tmp_path, environment, kills, batches):
    summary = write_corpora(config(tmp_path / "whole"), environment)
    out = tmp_path / "out"
    for where, count in kills:
        killed(config(out), where, count)
        if where != "end":
            assert not (out / "rot.jsonl").exists()
    counting = Counting(environment)
    again = write_corpora(config(out), counting)
    assert again.replace(str(out), "") == summary.replace(str(tmp_path / "whole"), "")
    assert contents(out) == contents(tmp_path / "whole")
    assert counting.batches == batches
    assert {p.name for p in out.iterdir()} - set(FILES) == {"config.json"} | {
        p.name
        for p in out.glob(".*.jsonl.*")  # of the killed process
    }


def test_killed_while_the_teacher_answers_no_call_is_paid_twice(tmp_path, environment):
    with Endpoint() as endpoint:
        teacher = TeacherConfig(base_url=endpoint.url, model="m", concurrency=1, input_price=1.0)
        write_corpora(config(tmp_path / "whole", teacher=teacher), environment)
        paid = len(endpoint.bodies)
        assert paid > 10
        out = tmp_path / "out"
        endpoint.bodies.clear()
        killed(config(out, teacher=teacher), "teacher", 7)
        # The answer that was being written is lost with the process; no other is asked for again.
        assert len(endpoint.bodies) == 8
        summary = write_corpora(config(out, teacher=teacher), environment)
        assert len(endpoint.bodies) == paid + 1
        assert f"teacher: {paid} answers" in summary
        assert contents(out) == contents(tmp_path / "whole")
        endpoint.bodies.clear()
        write_corpora(config(out, teacher=teacher), environment)
        assert not endpoint.bodies
    for record in read_records(out / "rot.jsonl"):
        meta = record["rot_meta"]
        assert record["regrpo"]["reflection"] == "teacher"
        assert meta["reflection"]["fix_plan"].startswith("call ")
        told = [m["content"] for m in record["conversations"]]
        assert any(f"- FixPlan: {meta['reflection']['fix_plan']}\n" in text for text in told)


def test_declined_failures_are_dropped_and_counted(tmp_path, environment):
    plain = write_corpora(config(tmp_path / "plain"), environment)
    assert "teacher" not in plain
    for record in read_records(tmp_path / "plain" / "rot.jsonl"):
        assert "reflection" not in record.get("regrpo", {})
    with Endpoint() as endpoint:
        endpoint.script = [answer("no")]
        teacher = TeacherConfig(base_url=endpoint.url, model="m", asks=1, concurrency=1)
        summary = write_corpora(config(tmp_path / "out", teacher=teacher), environment)
    assert "dropped 1: teacher: the answer is no JSON" in summary
    count = len(read_records(tmp_path / "plain/rot.jsonl"))
    assert len(read_records(tmp_path / "out/rot.jsonl")) == count - 1
    for name in ("success.jsonl", "clean.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def command(capsys, *arguments):
    """What a failing command prints."""
    with pytest.raises(SystemExit) as error:
        main(["data", "build", *map(str, arguments)])
    assert error.value.code not in (0, None)
    text = error.value.code if isinstance(error.value.code, str) else ""
    return text + capsys.readouterr().err


def test_a_dead_endpoint_ends_in_one_line_and_the_command_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with Endpoint() as endpoint:
        arguments = ["--out", out, "--count", 16, "--teacher.base_url", endpoint.url]
        arguments += ["--teacher.model", "m", "--teacher.backoff_s", 0.001]
        endpoint.script = [answer()] * 3
        endpoint.default = status(503, "overloaded")
        message = command(capsys, *arguments, "--teacher.concurrency", 1)
        assert "status 503: overloaded (6 attempts)" in message
        assert "reflections are left, the rest is kept, and the same command goes on" in message
        assert "Traceback" not in message
        assert not (out / "rot.jsonl").exists()
        endpoint.default = answer()
        # What the records do not depend on may change.
        monkeypatch.setenv("TEACHER_KEY", "sk-top-secret")
        more = ["--teacher.concurrency", 8, "--teacher.api_key_env", "TEACHER_KEY"]
        main(["data", "build", *map(str, [*arguments, *more])])
        (answers,) = re.findall(r"teacher: (\d+) answers", capsys.readouterr().out)
        assert len(endpoint.bodies) == 6 + int(answers)
        assert endpoint.headers[-1]["Authorization"] == "Bearer sk-top-secret"
    for path in out.iterdir():
        assert b"top-secret" not in path.read_bytes()


def test_what_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    url = ["--teacher.base_url", "http://127.0.0.1:9/v1"]
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    for arguments, message in (
        ([*url], "teacher.model: got None; expected a name together with teacher.base_url"),
        (["--teacher.base_url", "ftp://x", "--teacher.model", "m"], "teacher.base_url: got 'ftp"),
        (
            [*url, "--teacher.model", "m", "--teacher.api_key_env", "TEACHER_KEY"],
            "the environment variable TEACHER_KEY is not set",
        ),
        (["--teacher.concurrency", 0], "teacher.concurrency: got 0; expected 1 or more"),
        (["--teacher.colour", "red"], "teacher.colour"),
        (["--non_commit_share", 1.0], "non_commit_share: got 1.0; expected a share below 1"),
    ):
        assert message in command(capsys, "--out", out, *arguments)
    key = command(
        capsys, "--out", out, *url, "--teacher.model", "m", "--teacher.api_key_env", "sk-abc"
    )
    assert "expected the name of an environment variable" in key
    assert not out.exists()


def test_another_configuration_is_refused(tmp_path, environment):
    write_corpora(config(tmp_path), environment)
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"differs in: count, tasks.seed\)"):
        write_corpora(config(tmp_path, count=8, tasks=TaskConfig(seed=22)), environment)
    write_corpora(config(tmp_path, teacher=TeacherConfig(retries=9)), environment)
    assert contents(tmp_path) == before


def test_two_builds_in_one_folder(tmp_path, environment):
    with (
        Journal(tmp_path / "executed.jsonl"),
        pytest.raises(RunError, match=r"executed.jsonl is in use by another process"),
    ):
        write_corpora(config(tmp_path), environment)


def test_a_journal_cuts_off_a_torn_tail_only(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for text in ("a", "é\u2028", "cc"):
            journal.append({"text": text})
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            kept = len(journal.entries)
            journal.append("more")
        assert kept == whole[:end].count(b"\n")
        assert path.read_bytes() == b"".join(lines[:kept]) + b'"more"\n'
    path.write_bytes(lines[0] + b'{"te\n' + lines[2])
    with pytest.raises(RunError, match=r"j.jsonl:2 is damaged"):
        Journal(path)
    assert os.path.getsize(path) == len(lines[0]) + 5 + len(lines[2])
