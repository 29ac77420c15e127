import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from regrpo.sandbox import Sandbox
from regrpo.tool_calls import ToolCall
from regrpo.tools import Observation, Status
from regrpo.workspace import PageFile, SqliteFile, TextFile, build_workspace

TIMEOUT_S = 0.4
# One opcode of SQLite's virtual machine that runs for ages: only a kill from outside ends it.
HANG = ToolCall(
    "sql", ("a.db", "SELECT instr(hex(zeroblob(9000000)), hex(zeroblob(5000000)) || 1)")
)
MEMORY_BOMB = ToolCall("sql", ("a.db", "SELECT length(hex(zeroblob(100000000)))"))
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c)"
FINE = ToolCall("read_file", ("a.txt",))
READ = Observation("text", Status.OK)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outer") / "workspace"
    folder.mkdir()
    (folder.parent / "secret.txt").write_text("secret")
    (folder.parent / "secret").mkdir()
    build_workspace(
        folder,
        [
            TextFile("a.txt", "text"),
            TextFile("big.txt", "x" * 100_000),
            SqliteFile("a.db", "CREATE TABLE t(a); INSERT INTO t VALUES (1);"),
            PageFile("page.png", (60, 30), ((0, 0, "page"),)),
            TextFile("docs/a.txt", "fox"),
        ],
    )
    # What no workspace holds, for `build_workspace` refuses it.
    (folder / "out").symlink_to("../secret.txt")
    (folder / "absolute").symlink_to(folder.parent / "secret.txt")
    (folder / "away").symlink_to("../secret")
    (folder / "docs/out.txt").symlink_to("../../secret.txt")
    return folder


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(timeout_s=TIMEOUT_S, memory_mb=256, max_output_chars=2000) as sandbox:
        yield sandbox


def test_a_batch_comes_back_in_order(sandbox, root):
    calls = [ToolCall("calculator", (f"{n} * {n}",)) for n in range(1000)]
    observations = sandbox.run([(root, call) for call in calls])
    assert [int(observation.text) for observation in observations] == [n * n for n in range(1000)]
    assert sandbox.run([]) == []


def test_a_relative_root_is_that_of_the_caller(sandbox, root, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert sandbox.run([(Path("workspace"), FINE)]) == [READ]


def test_the_same_as_in_this_process(sandbox, root):
    from regrpo.tools import call_tool

    calls = [
        FINE,
        ToolCall("sql", ("a.db", "SELECT b FROM t")),
        ToolCall("list_dir"),
        ToolCall("read_region", ("page.png", 0, 0, 60, 30)),
        ToolCall("search", ("fox",)),
        ToolCall("foo", ((1, [2.5, {"a": None}]),)),
    ]
    assert sandbox.run([(root, call) for call in calls]) == [call_tool(root, c) for c in calls]


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "a/../../secret.txt", "out", "absolute", "away/x", "/etc/passwd",
        "docs/out.txt", "./../secret.txt", "file:../secret.txt", "a.txt\0", "..", "/", "~/x",
        "a.txt?mode=rw", "%2e%2e/secret.txt",
    ],
)  # fmt: skip
def test_no_path_leaves_the_workspace(sandbox, root, path):
    calls = [
        ToolCall("read_file", (path,)),
        ToolCall("list_dir", (path,)),
        ToolCall("sql", (path, "SELECT 1 FROM sqlite_master")),
        ToolCall("read_region", (path, 0, 0, 1, 1)),
    ]
    for observation in sandbox.run([(root, call) for call in calls]):
        assert observation.status is Status.ERROR
        assert "secret\n" not in observation.text.replace("../secret\n", "")
        assert str(root) not in observation.text.replace(f"absolute -> {root.parent}", "")


def test_documents_outside_are_not_searched(sandbox, root):
    (observation,) = sandbox.run([(root, ToolCall("search", ("secret",)))])
    assert observation.status is Status.EMPTY


@pytest.mark.parametrize(
    "query",
    [
        "ATTACH '../x.db' AS x",
        "ATTACH ':memory:' AS x",
        "SELECT load_extension('libm.so.6')",
        "SELECT LOAD_EXTENSION('libm.so.6', 'x')",
        "VACUUM INTO 'x.db'",
        "CREATE TEMP TABLE x AS SELECT 1",
        "INSERT INTO t VALUES (2)",
        "PRAGMA writable_schema = 1",
        "SELECT * FROM pragma_database_list",
        "SELECT readfile('/etc/passwd')",
        "SELECT fts3_tokenizer('simple')",
    ],
)
def test_queries_can_only_read(sandbox, root, query):
    before = (root / "a.db").read_bytes()
    (observation,) = sandbox.run([(root, ToolCall("sql", ("a.db", query)))])
    assert observation.status is Status.ERROR
    assert (root / "a.db").read_bytes() == before


def test_long_output_is_cut_visibly(sandbox, root):
    many = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT * FROM c"
    calls = [ToolCall("read_file", ("big.txt",)), ToolCall("sql", ("a.db", many))]
    for observation in sandbox.run([(root, call) for call in calls]):
        assert len(observation.text) == 2000 + len("… [truncated]")
        assert observation.text.endswith("… [truncated]")


def test_lone_surrogates_do_not_reach_the_tokenizer(sandbox, root):
    (observation,) = sandbox.run([(root, ToolCall("final_answer", ("a\ud800",)))])
    assert observation == Observation("a?", Status.OK)


def test_an_endless_query_is_interrupted_by_its_steps(sandbox, root):
    rows, total = (
        ToolCall("sql", ("a.db", f"{ENDLESS} SELECT {columns} FROM c"))
        for columns in ("x", "sum(x)")
    )
    first, second, third = sandbox.run([(root, rows), (root, total), (root, FINE)])
    assert first.text.startswith("1\n1\n")  # its rows up to the limit
    assert second == Observation("OperationalError: interrupted\nCREATE TABLE t(a)", Status.ERROR)
    assert third == READ


def test_a_call_that_hangs_or_crashes_costs_only_itself(sandbox, root):
    calls = [FINE, HANG, FINE, MEMORY_BOMB, FINE, HANG, FINE]
    pid = sandbox.pid
    start = time.perf_counter()
    observations = sandbox.run([(root, call) for call in calls])
    hang = Observation(f"TimeoutError: sql took longer than {TIMEOUT_S} s", Status.ERROR)
    crash = Observation("ToolCrash: sql ended with MemoryError", Status.ERROR)
    assert observations == [READ, hang, READ, crash, READ, hang, READ]
    assert sandbox.pid != pid
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_killed_in_the_middle_loses_one_call(root, sent):
    with Sandbox(timeout_s=20) as sandbox:
        timer = threading.Timer(0.3, os.kill, (sandbox.pid, sent))
        timer.start()
        observations = sandbox.run([(root, FINE), (root, HANG), (root, FINE)])
        timer.join()
        crash = Observation(f"ToolCrash: sql ended with {sent.name}", Status.ERROR)
        assert observations == [READ, crash, READ]


def test_a_worker_killed_while_idle_costs_nothing(root):
    with Sandbox() as sandbox:
        os.kill(sandbox.pid, signal.SIGKILL)
        assert sandbox.run([(root, FINE)]) == [READ]


def test_an_interrupt_leaves_no_stale_answers(root):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Sandbox(timeout_s=20) as sandbox:
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                sandbox.run([(root, FINE), (root, HANG)])
            timer.join()
            answer = ToolCall("final_answer", ("b",))
            assert sandbox.run([(root, answer)]) == [Observation("b", Status.OK)]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_the_worker_is_confined_and_light(sandbox, root):
    proc = Path(f"/proc/{sandbox.pid}")
    table = (proc / "limits").read_text().splitlines()
    limits = {line[:25].strip(): line[26:].split()[0] for line in table}
    assert limits["Max file size"] == "0"
    assert limits["Max open files"] == "64"
    assert int(limits["Max address space"]) == 256 * 2**20
    assert "torch" not in (proc / "maps").read_text()
    environ = (proc / "environ").read_bytes().split(b"\0")
    assert {entry.split(b"=")[0] for entry in environ} <= {
        b"PATH",
        b"LD_LIBRARY_PATH",
        b"LC_ALL",
        b"",
    }
    if not sandbox.network:
        devices = (proc / "net/dev").read_text().split("\n")[2:-1]
        assert [device.split(":")[0].strip() for device in devices] == ["lo"]


def test_the_worker_ends_with_its_owner():
    code = (
        "import os; from regrpo.sandbox import Sandbox; "
        "print(Sandbox().__enter__().pid, flush=True); os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}/exe").exists()


def test_many_calls_a_second(root):
    calls = [ToolCall("sql", ("a.db", "SELECT a FROM t")), FINE] * 128
    with Sandbox() as sandbox:
        requests = [(root, call) for call in calls]
        sandbox.run(requests)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            sandbox.run(requests)
            times.append(time.perf_counter() - start)
    assert len(calls) / min(times) > 1000  # 8,000 on a quiet machine


def test_use_outside_of_the_context_and_bad_limits(root, monkeypatch):
    with pytest.raises(RuntimeError, match="with Sandbox"):
        Sandbox().run([(root, FINE)])
    with Sandbox() as sandbox:
        pid = sandbox.pid
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run([(root, FINE)])
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ValueError, match="timeout_s"):
        Sandbox(timeout_s=0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start: exit code 1"):
        Sandbox().__enter__()
