"""The process that runs tool calls for `regrpo.sandbox`: limits itself, then serves batches.

Requests come on stdin as an 8-byte length and a pickled list of `(root, ToolCall)`. Answers leave
on stdout as JSON lines: `{"network": bool}` once, then for each batch `null` when it has arrived
and `[text, status]` for each call.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from regrpo.tool_calls import ToolCall
from regrpo.tools import call_tool

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
TRUNCATED = "… [truncated]"


def main(timeout_s: float, memory_mb: int, max_output_chars: int) -> None:
    """Serve until stdin ends. A call past `timeout_s` ends the process by SIGALRM."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    network = not _leave_network()
    _limit(memory_mb * 2**20)
    _send({"network": network})
    requests = sys.stdin.buffer
    while header := requests.read(8):
        batch: list[tuple[Path, ToolCall]] = pickle.loads(
            requests.read(int.from_bytes(header, "big"))
        )
        _send(None)
        for root, call in batch:
            # The kernel ends the process even inside a C call that never returns to Python.
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            observation = call_tool(root, call)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send([_shown(observation.text, max_output_chars), observation.status.value])


def _shown(text: str, max_chars: int) -> str:
    if len(text) > max_chars:
        text = text[:max_chars] + TRUNCATED
    return text.encode(errors="replace").decode()  # lone surrogates cannot be tokenised


def _send(message: Any) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


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
