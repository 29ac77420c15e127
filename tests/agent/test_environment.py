import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrpo.environment import Environment, LocalEnvironment
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import TOOLS, Observation, Status
from regrpo.workspace import LinkFile, PageFile, SqliteFile, TextFile

FILES = (
    TextFile("a.txt", "text"),
    TextFile("docs/a.txt", "fox"),
    TextFile("t.csv", "a,b\n"),
    LinkFile("link", "a.txt"),
    SqliteFile("a.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1);"),
    PageFile("p.png", (60, 30), ((0, 0, "page"),)),
)


def turn(name, *args, **kwargs):
    return Turn(None, "try", ToolCall(name, args, kwargs)).render()


@pytest.fixture(scope="module")
def environment():
    with LocalEnvironment(timeout_s=1.0) as environment:
        yield environment


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def tree_hash(folder):
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        stat = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        digest.update(repr((str(path), stat.st_mode, stat.st_mtime_ns, content)).encode())
    return digest.hexdigest()


def test_turns_run_in_their_own_workspace(environment: Environment):
    other = (TextFile("a.txt", "other"),)
    reflected = Turn(Reflection("ArgInvalid", "e", "p"), "t", ToolCall("read_file", ("a.txt",)))
    observations = environment.execute(
        [
            (FILES, turn("read_file", "a.txt")),
            (other, turn("read_file", "a.txt")),
            (FILES, "Thought: hm"),
            (other, reflected.render()),
            (FILES, "Code:\n```py\nread_file('a.txt'\n```"),
            ((), turn("list_dir")),
        ]
    )
    assert [observation.text.split("\n")[0] for observation in observations] == [
        "text",
        "other",
        "SyntaxError: no code block; expected Code: and one tool call between ```py and ```",
        "other",
        "SyntaxError: '(' was never closed",
        "(empty folder)",
    ]
    assert [observation.status.value for observation in observations] == [
        "ok", "ok", "error", "ok", "error", "empty"
    ]  # fmt: skip
    assert environment.execute([]) == []


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
paths = st.sampled_from([file.path for file in FILES]) | st.text("a./~\0-", max_size=8) | st.text()
words = (
    *(
        "SELECT",
        "INSERT INTO",
        "DELETE FROM",
        "UPDATE",
        "SET",
        "FROM",
        "t",
        "a",
        "=",
        "1",
        ",",
        "(",
    ),
    *(")", "*", ";", "--", "PRAGMA", "ATTACH 'x.db' AS x", "CREATE TABLE", "VACUUM INTO 'x.db'"),
    *("UNION", "count(*)", "hex(zeroblob(99))", "WITH", "VALUES", "sqlite_master"),
)
queries = st.text() | st.lists(st.sampled_from(words)).map(" ".join)
arguments = paths | queries | scalars | st.lists(scalars, max_size=2)
calls = st.builds(
    ToolCall,
    st.sampled_from([tool.__name__ for tool in TOOLS]),
    st.lists(arguments, max_size=5).map(tuple),
    st.dictionaries(
        st.sampled_from(["path", "query", "x0", "root", "answer"]), arguments, max_size=1
    ),
) | st.one_of(
    st.builds(ToolCall, st.just("sql"), st.tuples(st.just("a.db"), queries)),
    st.builds(ToolCall, st.just("read_file"), st.tuples(paths)),
    st.builds(
        ToolCall,
        st.just("read_region"),
        st.tuples(st.just("p.png"), *[st.integers(-1, 61) | st.integers()] * 4),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(calls, min_size=1, max_size=20))
def test_any_call_gives_an_observation_and_changes_nothing(environment, batch):
    folder = environment._folder.name
    environment.execute([(FILES, turn("list_dir"))])
    before, pid = tree_hash(folder), environment._sandbox.pid
    texts = [Turn(None, "x", call).render() for call in batch]
    observations = environment.execute([(FILES, text) for text in texts])
    assert len(observations) == len(batch)
    for observation in observations:
        assert isinstance(observation, Observation)
        assert observation.text or observation.status is Status.OK
        assert folder not in observation.text
    assert tree_hash(folder) == before
    assert environment._sandbox.pid == pid  # none of these brings a tool down


@settings(deadline=None)
@given(st.text() | st.text().map("Code:\n```py\n{}\n```".format))
def test_any_text_gives_an_observation(environment, text):
    (observation,) = environment.execute([(FILES, text)])
    assert observation.text


def test_a_workspace_is_built_once_and_the_oldest_goes(temporary):
    with LocalEnvironment(max_workspaces=2) as environment:
        (folder,) = temporary.iterdir()
        spaces = [(TextFile("a.txt", str(n)),) for n in range(5)]
        read = turn("read_file", "a.txt")
        observations = environment.execute([(space, read) for space in spaces * 2])
        assert [observation.text for observation in observations] == list("01234") * 2
        assert {path.name for path in folder.iterdir()} == {"3", "4"}
        environment.execute([(tuple(spaces[3]), read), (spaces[0], read)])
        assert {path.name for path in folder.iterdir()} == {"3", "5"}
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_behind_after_an_exception(temporary):
    def fail():
        with LocalEnvironment() as environment:
            environment.execute([(FILES, turn("list_dir"))])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(temporary.iterdir()) == []


def test_a_workspace_that_cannot_be_built_is_the_callers_error(temporary):
    with LocalEnvironment() as environment:
        with pytest.raises(ValueError, match=r"script of 'a\.db'"):
            environment.execute([((SqliteFile("a.db", "SELEC"),), turn("list_dir"))])
        (folder,) = temporary.iterdir()
        assert list(folder.iterdir()) == []
        assert environment.execute([(FILES, turn("read_file", "a.txt"))])[0].text == "text"
    with pytest.raises(RuntimeError, match="closed"):
        environment.execute([(FILES, turn("read_file", "a.txt"))])
