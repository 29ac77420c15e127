"""Code that a model wrote: it computes, and every attempt to get out is contained."""

import base64
import io
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from regrpo.code_runner import CodeRunner
from regrpo.containment import why_not_contained

pytestmark = pytest.mark.skipif(
    why_not_contained() is not None, reason=f"no containment: {why_not_contained()}"
)
SOLVE = """```python
from sympy import symbols, solve
def solution():
    x = symbols('x')
    return str(solve(x**2 - 4, x))
```"""


@pytest.fixture(scope="module")
def runner():
    with CodeRunner(timeout_s=2, memory_mb=1024) as runner:
        yield runner


def test_code_computes_and_errors_are_results(runner):
    assert runner.run(SOLVE, "text").text == "[-2, 2]"
    failed = runner.run("def solution():\n    return 1 / 0", "text")
    assert (failed.ok, failed.text) == (False, "ZeroDivisionError: division by zero")
    assert runner.run("def f(): pass", "text").text.startswith("NameError: the code defines no")
    assert runner.run("def solution(:", "text").text.startswith("SyntaxError: ")


def test_a_figure_is_a_png(runner):
    code = (
        "import matplotlib.pyplot as plt\n"
        "def solution():\n    figure = plt.figure(figsize=(2, 1))\n"
        "    plt.plot([1, 2], label='$x^2$')\n    plt.legend()\n    return figure"
    )
    result = runner.run(code, "plot")
    assert result.ok, result.text
    image = Image.open(io.BytesIO(base64.b64decode(result.text)))
    assert (image.format, image.size) == ("PNG", (200, 100))
    assert "expected a matplotlib figure" in runner.run("def solution(): return 1", "plot").text


@pytest.mark.parametrize(
    "body",
    [
        "import os",
        "from subprocess import run",
        "import sympy.os, socket",
        "return __import__('os')",
        "return ().__class__.__mro__[1].__subclasses__()",
        "return (lambda: 0).__globals__",
        "return open('/etc/passwd').read()",
        "return eval('1')",
        "exec('import os')",
        "raise SystemExit(3)",
    ],
)
def test_the_code_is_screened(body):
    from regrpo.code_worker import _run

    with pytest.raises((ImportError, NameError, SystemExit)):
        _run(f"def solution():\n    {body}", "text")


# The modules that `random` and `numpy` import are attributes of theirs: the screen does not see
# what follows, so that the kernel's walls alone stand in its way.
ATTEMPTS = """
import random
os = random._os
sys_modules = os.sys.modules
real = getattr(os, "__buil" + "tins__")
load = real["__import__"]

def attempts():
    libc = load("ctypes").CDLL(None, use_errno=True)
    yield "read outside", lambda: real["open"](SECRET).read()
    yield "path traversal", lambda: real["open"]("/usr/lib/../.." + SECRET).read()
    yield "read passwd", lambda: real["open"]("/etc/passwd").read()
    yield "read environ", lambda: real["open"]("/proc/self/environ").read()
    yield "read memory", lambda: real["open"]("/proc/%d/mem" % PARENT, "rb").read(1)
    yield "follow a link", lambda: real["open"](LINK).read()
    yield "list a folder", lambda: os.listdir(FOLDER)
    yield "write", lambda: real["open"](FOLDER + "/new", "w").write("x")
    yield "write to tmp", lambda: real["open"]("/tmp/regrpo-escape", "w").write("x")
    yield "remove", lambda: os.remove(SECRET)
    yield "rename", lambda: os.rename(SECRET, SECRET + "x")
    yield "symlink", lambda: os.symlink(SECRET, FOLDER + "/link2")
    yield "hard link", lambda: os.link(SECRET, FOLDER + "/link3")
    yield "make a folder", lambda: os.mkdir(FOLDER + "/made")
    yield "change mode", lambda: os.chmod(SECRET, 0o777)
    yield "truncate", lambda: os.truncate(SECRET, 0)
    yield "fifo", lambda: os.mkfifo(FOLDER + "/fifo")
    yield "fork", lambda: os.fork()
    yield "shell", lambda: os.system("touch " + FOLDER + "/shell") and 1 / 0
    yield "subprocess", lambda: load("subprocess").run(["true"])
    yield "spawn", lambda: os.posix_spawn("/bin/true", ["true"], {})
    yield "execute", lambda: os.execv("/bin/true", ["true"])
    yield "multiprocessing", lambda: load("multiprocessing").Process(target=print).start()
    yield "thread", lambda: load("_thread").start_new_thread(print, ())
    yield "kill the parent", lambda: os.kill(PARENT, 9)
    yield "kill all", lambda: os.kill(-1, 9)
    yield "connect", lambda: load("socket").create_connection(("127.0.0.1", PORT))
    yield "unix socket", lambda: load("socket").socket(load("socket").AF_UNIX)
    yield "raise limits", lambda: load("resource").setrlimit(0, (-1, -1))
    yield "become another user", lambda: os.setuid(1)
    yield "chroot", lambda: os.chroot("/usr")
    yield "unshare", lambda: os.unshare(0x10000000) if hasattr(os, "unshare") else 1 / 0
    yield "memfd", lambda: os.memfd_create("x")
    for name, number in (("ptrace", 101), ("mount", 165), ("bpf", 321), ("io_uring", 425),
                         ("clone", 56), ("clone3", 435), ("openat2", 437), ("keyctl", 250)):
        yield name, lambda: 1 / 0 if libc.syscall(number, 0, 0, 0, 0) == -1 else None

def solution():
    got_out = []
    count = 0
    for name, attempt in attempts():
        count += 1
        try:
            attempt()
        except (OSError, ZeroDivisionError, RuntimeError, ValueError):
            continue
        except AttributeError as error:  # a name of a newer Python
            assert "module 'os'" in str(error), error
            continue
        got_out.append(name)
    return "%d attempts, out: %s" % (count, got_out)
"""


def test_every_attempt_to_get_out_is_contained(runner, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    link = tmp_path / "link"
    link.symlink_to(secret)
    before = sorted(tmp_path.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = (
            f"SECRET, LINK, FOLDER = {str(secret)!r}, {str(link)!r}, {str(tmp_path)!r}\n"
            f"PARENT, PORT = {os.getpid()}, {server.getsockname()[1]}\n"
        )
        result = runner.run(names + ATTEMPTS, "text")
    assert result.text == "41 attempts, out: []"
    assert secret.read_text() == "secret"
    assert sorted(tmp_path.iterdir()) == before
    assert not os.path.exists("/tmp/regrpo-escape")


ENDLESS = {
    "loop": ("while True: pass", "TimeoutError: "),
    "sleep": ("import random; random._os.sys.modules['time'].sleep(99)", "TimeoutError: "),
    "C loop": ("return sum(range(10**12))", "TimeoutError: "),
    "memory": ("return len('x' * 10**10)", "MemoryError"),
    "recursion": ("return solution()", "RecursionError"),
    "long result": ("return 'x' * 10**8", "x" * 100_000),
    "flood": (
        "import random; os = random._os\n"
        "    while True:\n        for fd in range(3, 9):\n"
        "            try: os.write(fd, b'x' * 65536)\n            except OSError: pass",
        "ValueError: the result is too large",
    ),
    "hard exit": ("import random; random._os._exit(7)", "ToolCrash: the process ended with"),
    "evil error": (
        "def f(self): raise self\n    raise type('E', (Exception,), {'__str__': f})()",
        "E: (no message)",
    ),
    "forged result": (
        "import random; random._os.write(3, b'[1]'); random._os._exit(0)",
        "ToolCrash: the process ended with status 0",
    ),
}


def test_nothing_runs_on(runner):
    """Each ends, in little more than its time, and the runner goes on."""
    begin = time.monotonic()
    codes = [f"def solution():\n    {body}" for body, _ in ENDLESS.values()]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda code: runner.run(code, "text"), codes))
    for (name, (_, expected)), result in zip(ENDLESS.items(), results, strict=True):
        assert result.text.startswith(expected), (name, result.text[:200])
        assert len(result.text) <= 100_000
    assert time.monotonic() - begin < 90
    assert runner.run(SOLVE, "text").ok
