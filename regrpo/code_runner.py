"""Runs Python code that a model wrote, each piece in a process of its own behind kernel walls."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from regrpo.code_worker import MAX_PNG, READY
from regrpo.containment import why_not_contained
from regrpo.errors import RunError
from regrpo.sandbox_worker import WALL_FACTOR

MAX_CODE = 100_000
_MAX_ANSWER = 2 * MAX_PNG  # base64 and JSON
_START_S = 60.0  # imports, on a busy machine
_KINDS = ("text", "plot")


@dataclass(frozen=True)
class CodeResult:
    """``text`` is what ``solution()`` gave, a PNG in base64 of a plot, or the error."""

    ok: bool
    text: str


class CodeRunner:
    """Calls ``solution()`` of code; a context manager, for use by several threads.

    The code may use the standard library's mathematics, sympy, numpy and matplotlib. It gets
    ``timeout_s`` seconds of processor time, five times that by the clock, and ``memory_mb`` MiB;
    it can read the files of Python and its libraries, and has no files to write, no processes,
    no threads and no network.

    Entering raises RunError where the system cannot contain code.
    """

    def __init__(self, *, timeout_s: int = 20, memory_mb: int = 2048) -> None:
        if timeout_s < 1 or memory_mb < 512:
            raise ValueError(
                f"timeout_s and memory_mb: got {timeout_s} and {memory_mb}; expected at least 1 "
                "and 512"
            )
        self.timeout_s, self.memory_mb = timeout_s, memory_mb
        # Outlives the processes: matplotlib keeps its list of fonts there.
        self._cache = tempfile.TemporaryDirectory(prefix="regrpo-matplotlib-")

    def __enter__(self) -> CodeRunner:
        reason = why_not_contained()
        if reason is None:
            result = self.run("def solution(): return 'works'", "text")
            reason = None if result == CodeResult(True, "works") else result.text
        if reason is not None:
            self._cache.cleanup()
            raise RunError(f"code of a model cannot be run here: {reason}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cache.cleanup()

    def run(self, code: str, kind: str) -> CodeResult:
        """The result of one piece of code; whatever goes wrong in it is a result as well.

        Args:
            code: Python, or Markdown with a fenced block of it.
            kind: "text" for ``str(solution())``, "plot" for a figure.
        """
        if kind not in _KINDS:
            raise ValueError(f"kind: got {kind!r}; expected text or plot")
        if len(code) > MAX_CODE:
            return CodeResult(
                False, f"ValueError: {len(code)} characters of code; at most {MAX_CODE}"
            )
        request = {
            "code": _plain(code),
            "kind": kind,
            "timeout_s": self.timeout_s,
            "memory_mb": self.memory_mb,
        }
        process = self._start()
        try:
            return self._result(process, json.dumps(request).encode())
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[1])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); "
            f"from regrpo.code_worker import main; main({self._cache.name!r})"
        )
        kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={**kept, **one, "MPLCONFIGDIR": self._cache.name, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )

    def _result(self, process: subprocess.Popen[bytes], request: bytes) -> CodeResult:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it ended before it read; what follows says how
            process.stdin.write(request)
            process.stdin.close()
        deadline = time.monotonic() + _START_S
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return CodeResult(False, f"TimeoutError: no result within {self.timeout_s} s")
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                if not data:  # begins with READY
                    deadline = time.monotonic() + WALL_FACTOR * self.timeout_s
                data += chunk
                if len(data) > _MAX_ANSWER:
                    return CodeResult(False, "ValueError: the result is too large")
        code = process.wait()
        # The code can write to this pipe as well: it is read as data, of a fixed shape.
        try:
            answer = json.loads(data.removeprefix(READY))
            return CodeResult(bool(answer["ok"]), str(answer["text"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            if code == -9:
                return CodeResult(False, f"TimeoutError: more than {self.timeout_s} s of computing")
            return CodeResult(False, f"ToolCrash: the process ended with status {code}")


def _plain(code: str) -> str:
    """The first fenced block, or everything."""
    for fence in ("```python", "```py", "```"):
        if fence in code:
            return code.split(fence, 1)[1].split("```", 1)[0]
    return code
