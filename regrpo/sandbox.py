"""Runs tool calls in a process of their own, which may crash, hang or run out of memory."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from regrpo.sandbox_worker import WALL_FACTOR
from regrpo.tool_calls import ToolCall
from regrpo.tools.custom import CustomTool
from regrpo.tools.observation import Observation, Status
from regrpo.tools.shipping import ship

_START_TIMEOUT_S = 60.0
_GRACE_S = 5.0  # the worker ends itself at the time limit; after that much longer it is killed
_MAX_STARTS = 3


class Sandbox:
    """One persistent worker process for tool calls, as a context manager.

    A call gets `timeout_s` seconds of processor time, and five times that by the clock; the worker
    `memory_mb` MiB of address space, and an observation at most `max_output_chars` characters. Not
    for use by two threads at a time.

    It runs the tools of `regrpo.tools` and copies of those given as `tools`, which may import what
    is on this process's `sys.path`.

    The worker is a fresh interpreter, so it is safe to start while torch threads run. It cannot
    write files, and has no network where the system permits network namespaces (see `network`).
    """

    def __init__(
        self,
        *,
        timeout_s: float = 2.0,
        memory_mb: int = 1024,
        max_output_chars: int = 4000,
        tools: Sequence[CustomTool] = (),
    ) -> None:
        for name, value in (
            ("timeout_s", timeout_s),
            ("memory_mb", memory_mb),
            ("max_output_chars", max_output_chars),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.timeout_s = timeout_s
        self._limits = (float(timeout_s), int(memory_mb), int(max_output_chars))
        # Without tools, nothing of the caller's is within reach of an import.
        paths = [os.path.abspath(path) for path in sys.path] if tools else []
        self._tools = pickle.dumps((paths, ship(tools)))
        self._worker: _Worker | None = None

    def __enter__(self) -> Sandbox:
        self._worker = _Worker(self._limits, self._tools)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def network(self) -> bool:
        """Whether the worker can reach a network, because the system did not let it leave."""
        return self._running().network

    @property
    def pid(self) -> int:
        """Process id of the worker. It changes after a call that timed out or crashed."""
        return self._running().pid

    def run(self, requests: Sequence[tuple[Path, ToolCall]]) -> list[Observation]:
        """Run each call in its workspace, in order, and give one observation for each.

        A call that hangs or brings the worker down is an ERROR observation; the calls after it go
        on in a fresh worker. Raises RuntimeError if no worker can be started.
        """
        observations: list[Observation] = []
        starts = 0
        while len(observations) < len(requests):
            worker = self._running()
            try:
                worker.send(requests[len(observations) :])
                starts = 0
                while len(observations) < len(requests):
                    observations.append(worker.receive())
            except _WorkerEndedError as ended:
                if worker.accepted:
                    call = requests[len(observations)][1]
                    observations.append(self._casualty(call, ended))
                elif (starts := starts + 1) == _MAX_STARTS:
                    raise RuntimeError(f"the sandbox worker keeps ending: {ended}") from ended
                self._worker = _Worker(self._limits, self._tools)
            except BaseException:  # an interrupt leaves answers in the pipe that nobody asked for
                worker.kill()
                self._worker = _Worker(self._limits, self._tools)
                raise
        return observations

    def _running(self) -> _Worker:
        if self._worker is None:
            raise RuntimeError("the sandbox is closed; use it as `with Sandbox() as sandbox:`")
        return self._worker

    def _casualty(self, call: ToolCall, ended: _WorkerEndedError) -> Observation:
        if ended.timed_out:
            text = f"TimeoutError: {call.name} took longer than {self.timeout_s} s"
        else:
            text = f"ToolCrash: {call.name} ended with {ended}"
        return Observation(text, Status.ERROR)


class _WorkerEndedError(Exception):
    def __init__(self, reason: str, *, timed_out: bool) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class _Worker:
    """The process and its two pipes. `accepted` says whether it has read the batch last sent."""

    def __init__(self, limits: tuple[float, int, int], tools: bytes) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r}); "
            f"from regrpo.sandbox_worker import main; main(*{limits!r})"
        )
        # -I and a bare environment: neither the caller's folder nor its secrets reach the worker.
        kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env={**kept, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._stdin, self._stdout, self._stderr = (cast(io.FileIO, pipe) for pipe in pipes)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._lines: list[bytes] = []  # complete answers, newest first
        self._rest = b""
        self._wait_s = WALL_FACTOR * limits[0] + _GRACE_S
        self.accepted = False
        self.pid = self._process.pid
        try:
            self._write(tools)
            self.network: bool = self._message(_START_TIMEOUT_S)["network"]
        except _WorkerEndedError as ended:
            raise RuntimeError(f"the sandbox worker does not start: {ended}") from ended

    def send(self, requests: Sequence[tuple[Path, ToolCall]]) -> None:
        self.accepted = False
        self._write(pickle.dumps([(root.absolute(), call) for root, call in requests]))
        self._message(self._wait_s)
        self.accepted = True

    def _write(self, data: bytes) -> None:
        view = memoryview(len(data).to_bytes(8, "big") + data)
        try:
            while view:
                view = view[self._stdin.write(view) :]
        except BrokenPipeError:
            raise self._ended(timed_out=False) from None

    def receive(self) -> Observation:
        text, status, picture = self._message(self._wait_s)
        image = None if picture is None else base64.b64decode(picture)
        return Observation(text, Status(status), image)

    def close(self) -> None:
        """End the process, at once if it is idle."""
        self._stdin.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()

    def _message(self, timeout_s: float) -> Any:
        while not self._lines:
            if not self._selector.select(timeout_s):
                raise self._ended(timed_out=True)
            data = self._stdout.read(1 << 16)
            if not data:
                raise self._ended(timed_out=False)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines = lines[::-1]
        return json.loads(self._lines.pop())

    def _ended(self, *, timed_out: bool) -> _WorkerEndedError:
        """Reap the process and say how it ended."""
        if timed_out:
            self._process.kill()
        code = self._process.wait()
        last_words = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.kill()
        if timed_out or code in (-signal.SIGPROF, -signal.SIGALRM):
            return _WorkerEndedError("a timeout", timed_out=True)
        if code < 0:
            return _WorkerEndedError(signal.Signals(-code).name, timed_out=False)
        return _WorkerEndedError(
            last_words[-1] if last_words else f"exit code {code}", timed_out=False
        )
