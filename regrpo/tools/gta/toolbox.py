"""Executes calls of GTA tools: here, by replaying what was recorded, or on a server."""

import base64
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from regrpo.code_runner import CodeRunner
from regrpo.image_files import to_png
from regrpo.sandbox_worker import shown
from regrpo.tool_calls import ToolCall
from regrpo.tools.gta.arithmetic import calculate_text
from regrpo.tools.gta.drawing import add_text, draw_box, open_image
from regrpo.tools.gta.files import EpisodeFiles
from regrpo.tools.gta.ocr import Reader
from regrpo.tools.gta.server import ServerError, ToolServer
from regrpo.tools.gta.specs import GTA_TOOLS, GtaTool
from regrpo.tools.observation import Observation, Status, failure

LOCAL = ("Calculator", "Solver", "Plot", "DrawBox", "AddText", "OCR")
Recordings = Mapping[str, str]


def call_key(call: ToolCall) -> str:
    """What a recording is found by: the tool, and its arguments with defaults filled in.

    Raises:
        TypeError: the arguments are not the tool's.
    """
    arguments = GTA_TOOLS[call.name].bind(call)
    return json.dumps([call.name, arguments], sort_keys=True, ensure_ascii=False)


def recordings(calls: Sequence[tuple[ToolCall, str]]) -> Recordings:
    """Calls and what they gave; of a call that was made twice, what it gave at first."""
    kept: dict[str, str] = {}
    for call, output in calls:
        kept.setdefault(call_key(call), output)
    return kept


class Toolbox:
    """A context manager, for use by several threads.

    A tool named in ``local`` runs here. The others ask the server, if there is one, and are
    replayed without. Nothing stands in for a tool that fails.

    Args:
        local: some of ``LOCAL``.
        server: where the others run; None replays them.
        code_timeout_s, code_memory_mb: of Solver and Plot, see `CodeRunner`.
        max_output_chars: of an observation.

    Attributes:
        counts: calls by where they went (``local``, ``replayed``, ``server``), ``not recorded``
            for calls that nothing was recorded of, ``server failed``.

    Raises:
        ValueError: ``local`` names another tool. RunError, on entering: a local tool cannot run.
    """

    def __init__(
        self,
        *,
        local: Sequence[str] = (),
        server: ToolServer | None = None,
        code_timeout_s: int = 20,
        code_memory_mb: int = 2048,
        max_output_chars: int = 4000,
    ) -> None:
        unknown = [name for name in local if name not in LOCAL]
        if unknown:
            raise ValueError(f"local: got {unknown}; expected some of {', '.join(LOCAL)}")
        self._local, self._server = frozenset(local), server
        self._code_limits = {"timeout_s": code_timeout_s, "memory_mb": code_memory_mb}
        self._max_output_chars = max_output_chars
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._reader_lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> "Toolbox":
        self._reader = Reader() if "OCR" in self._local else None
        if self._local & {"Solver", "Plot"}:
            self._code = self._stack.enter_context(CodeRunner(**self._code_limits))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def call(
        self,
        call: ToolCall,
        offered: Sequence[str],
        recorded: Recordings,
        files: EpisodeFiles,
    ) -> Observation:
        """The observation of a call; whatever goes wrong is one as well.

        Args:
            offered: the tools that the task offers.
            recorded: what replay knows.
            files: of the episode.
        """
        if call.name not in offered:
            names = ", ".join([*offered, "final_answer"])
            return failure(NameError(f"name '{call.name}' is not defined; tools: {names}"))
        tool = GTA_TOOLS[call.name]
        try:
            arguments = tool.bind(call)
        except TypeError as error:
            return failure(error)
        if call.name not in self._local and self._server is None:
            return self._replay(call, recorded)
        place = "local" if call.name in self._local else "server"
        self._count(place)
        try:
            if place == "local":
                value = self._here(tool, arguments, files)
            else:
                assert self._server is not None
                value = self._server.call(tool, arguments, files.read)
        except ServerError as error:
            self._count("server failed")
            return failure(error)
        except (OSError, ValueError) as error:
            return failure(error)
        if isinstance(value, Observation):
            return Observation(shown(value.text, self._max_output_chars), value.status)
        if isinstance(value, bytes):
            return Observation(files.add(value), Status.OK, value)
        text = value
        if not text.strip():
            return Observation("(no output)", Status.EMPTY)
        return Observation(shown(text, self._max_output_chars), Status.OK)

    def _replay(self, call: ToolCall, recorded: Recordings) -> Observation:
        text = recorded.get(call_key(call))
        if text is None:
            self._count("not recorded")
            return failure(LookupError(f"no output of this call of {call.name} was recorded"))
        self._count("replayed")
        if not text.strip():
            return Observation("(no output)", Status.EMPTY)
        return Observation(text, Status.OK)

    def _here(
        self, tool: GtaTool, arguments: dict[str, Any], files: EpisodeFiles
    ) -> str | bytes | Observation:
        if tool.name == "Calculator":
            return calculate_text(**arguments)
        if tool.name in ("Solver", "Plot"):
            kind = "plot" if tool.name == "Plot" else "text"
            result = self._code.run(arguments["command"], kind)
            if not result.ok:
                return Observation(result.text, Status.ERROR)
            if kind == "text":
                return result.text
            png = base64.b64decode(result.text)
            return to_png(open_image(png, "the figure"))  # the code may have sent anything
        name = arguments.pop("image")
        image = open_image(files.read(name), name)
        if tool.name == "OCR":
            assert self._reader is not None
            with self._reader_lock:
                return self._reader(image)
        draw = draw_box if tool.name == "DrawBox" else add_text
        return to_png(draw(image, **arguments))

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1
