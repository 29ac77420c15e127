"""Where turns of the model meet real files: parse the turn, run its call, give the observation."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from regrpo.sandbox import Sandbox
from regrpo.sandbox_worker import shown
from regrpo.tool_calls import ToolCall, ToolCallError, parse_turn
from regrpo.tools import TOOLS, VISION_TOOLS, no_such_tool
from regrpo.tools.cache import LRU
from regrpo.tools.custom import CustomTool
from regrpo.tools.observation import Observation, failure
from regrpo.workspace import WorkspaceFile, build_workspace

# Files to build a throw-away folder from, or a folder that is there already (tools only read it).
Workspace = tuple[WorkspaceFile, ...] | Path


class Environment(Protocol):
    """Executes turns. One may run them here, another on a remote tool server."""

    def execute(self, requests: Sequence[tuple[Workspace, str]]) -> list[Observation]:
        """One observation for each (workspace, text of the model's turn), in order.

        A turn that cannot be parsed or fails is an observation as well, never an exception.
        """
        ...


class LocalEnvironment:
    """Builds workspaces in a temporary folder and runs calls in a `Sandbox`; a context manager.

    Tools only read, so one folder serves every trajectory of a task. The `max_workspaces` used
    last are kept; all are removed on exit. `tools` are further tools of the sandbox; `local_tools`
    run in this process, without its limits.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 2.0,
        memory_mb: int = 1024,
        max_output_chars: int = 4000,
        max_workspaces: int = 4096,
        tools: Sequence[CustomTool] = (),
        local_tools: Sequence[CustomTool] = (),
    ) -> None:
        self._sandbox = Sandbox(
            timeout_s=timeout_s,
            memory_mb=memory_mb,
            max_output_chars=max_output_chars,
            tools=tools,
        )
        self._local = {tool.name: tool for tool in local_tools}
        self._custom = (*tools, *local_tools)
        self._known = {tool.__name__ for tool in (*TOOLS, *VISION_TOOLS)} | {
            tool.name for tool in self._custom
        }
        self._max_output_chars = max_output_chars
        # Keyed by content: two tasks with the same files share a folder.
        self._workspaces: LRU[tuple[WorkspaceFile, ...], Path] = LRU(
            max_workspaces, on_evict=shutil.rmtree
        )
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._built = 0

    def __enter__(self) -> LocalEnvironment:
        self._sandbox.__enter__()
        self._folder = tempfile.TemporaryDirectory(prefix="regrpo-")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._sandbox.__exit__(kind, error, traceback)
        finally:
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    def execute(self, requests: Sequence[tuple[Workspace, str]]) -> list[Observation]:
        """See `Environment.execute`. ValueError for a workspace that cannot be built."""
        observations: dict[int, Observation] = {}
        calls: list[tuple[Path, ToolCall]] = []
        for index, (files, text) in enumerate(requests):
            try:
                call = parse_turn(text).call
            except ToolCallError as error:
                observations[index] = failure(SyntaxError(str(error)))
                continue
            path = self._path(files)
            if call.name not in self._known:
                observations[index] = no_such_tool(call, self._custom)
            elif call.name in self._local:
                given = self._local[call.name].run(path, call)
                text = shown(given.text, self._max_output_chars)
                observations[index] = replace(given, text=text)
            else:
                calls.append((path, call))
        executed = iter(self._sandbox.run(calls))
        self._workspaces.trim()  # only now: a batch may need more folders than are kept
        return [observations.get(index) or next(executed) for index in range(len(requests))]

    def _path(self, files: Workspace) -> Path:
        if isinstance(files, Path):
            return files
        return self._workspaces.get(files, lambda: self._build(files))

    def _build(self, files: tuple[WorkspaceFile, ...]) -> Path:
        if self._folder is None:
            raise RuntimeError("the environment is closed; use it in a `with` statement")
        path = Path(self._folder.name, str(self._built))
        self._built += 1
        path.mkdir()
        try:
            build_workspace(path, files)
        except BaseException:
            shutil.rmtree(path)
            raise
        return path
