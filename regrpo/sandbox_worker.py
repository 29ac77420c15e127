"""The process that runs tool calls for `regrpo.sandbox`: limits itself, then serves batches.

Messages come on stdin as an 8-byte length and a pickle: once `(sys.path of the owner, tools)`, then
lists of `(root, ToolCall)`. Answers leave on stdout as JSON lines: `{"network": bool}` once, then
for each batch `null` when it has arrived and `[text, status, picture]` for each call, the picture a
file in base64 or null.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from regrpo.tool_calls import ToolCall
from regrpo.tools import Observation, call_tool
from regrpo.tools.observation import failure
from regrpo.tools.shipping import unship

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
# Processor time does not depend on what else the machine does, so the same call gives the same
# observation on a busy one; the wall clock ends a call that waits.
WALL_FACTOR = 5
MAX_IMAGE_BYTES = 16 * 2**20
TRUNCATED = "… [truncated]"


def main(timeout_s: float, memory_mb: int, max_output_chars: int) -> None:
    """Serve until stdin ends. A call past `timeout_s` ends the process by SIGPROF or SIGALRM."""
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {timer})
    network = not _leave_network()
    # What a user's tool prints must neither mix with the answers nor fill a pipe that nobody reads.
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
    os.dup2(nowhere.fileno(), 1)
    requests = _messages()
    paths, shipped = next(requests)
    sys.path.extend(path for path in paths if path not in sys.path)
    with contextlib.redirect_stderr(nowhere):
        custom = unship(shipped)
    _limit(memory_mb * 2**20)
    _send(answers, {"network": network})
    batch: list[tuple[Path, ToolCall]]
    for batch in requests:
        _send(answers, None)
        for root, call in batch:
            # The kernel ends the process even inside a C call that never returns to Python.
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * timeout_s)
            with contextlib.redirect_stderr(nowhere):
                observation = call_tool(root, call, custom)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(answers, _answer(observation, max_output_chars))


def _messages() -> Iterator[Any]:
    stdin = sys.stdin.buffer
    while header := stdin.read(8):
        yield pickle.loads(stdin.read(int.from_bytes(header, "big")))


def _answer(observation: Observation, max_chars: int) -> list[str | None]:
    """Text, status and picture, in base64."""
    image = observation.image
    if image is not None and len(image) > MAX_IMAGE_BYTES:
        observation = failure(
            ValueError(f"the picture has {len(image)} bytes, over {MAX_IMAGE_BYTES}")
        )
        image = None
    picture = None if image is None else base64.b64encode(image).decode()
    return [shown(observation.text, max_chars), observation.status.value, picture]


def shown(text: str, max_chars: int) -> str:
    """An observation's text as it is given out."""
    if len(text) > max_chars:
        text = text[:max_chars] + TRUNCATED
    return text.encode(errors="replace").decode()  # lone surrogates cannot be tokenised


def _send(answers: BinaryIO, message: Any) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _leave_network() -> bool:
    """Move to a network namespace without devices; False where the system does not permit it."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    return unshare is not None and (
        unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0 or unshare(_CLONE_NEWNET) == 0
    )


def _limit(memory_bytes: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),  # has no effect on root
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
