"""The tools an agent can call. Each is a plain function `(root, *arguments) -> Observation`.

Nothing here writes to the workspace. Failures are observations whose text begins with the class and
message of the exception that was really raised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints

from regrpo.tool_calls import ToolCall
from regrpo.tools.answer import final_answer
from regrpo.tools.calculator import calculator
from regrpo.tools.crop import crop
from regrpo.tools.custom import CustomTool, bind
from regrpo.tools.files import list_dir, read_file
from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.page import read_region
from regrpo.tools.search import search
from regrpo.tools.sql import sql

__all__ = [
    "TOOLS",
    "VISION_TOOLS",
    "Observation",
    "Status",
    "call_tool",
    "no_such_tool",
    "signature_text",
]

Tool = Callable[..., Observation]
TOOLS: tuple[Tool, ...] = (
    sql,
    read_file,
    list_dir,
    read_region,
    search,
    calculator,
    final_answer,
)
# For tasks that show images.
VISION_TOOLS: tuple[Tool, ...] = (crop, final_answer)
_BY_NAME = {tool.__name__: tool for tool in (*TOOLS, *VISION_TOOLS)}


def _public_signature(tool: Tool) -> inspect.Signature:
    """The signature the model sees: resolved types, without the workspace root."""
    hints = get_type_hints(tool)
    parameters = list(inspect.signature(tool).parameters.values())[1:]
    return inspect.Signature([p.replace(annotation=hints[p.name]) for p in parameters])


_SIGNATURES = {name: _public_signature(tool) for name, tool in _BY_NAME.items()}


def signature_text(tool: Tool) -> str:
    """A tool's name and typed arguments, such as `sql(database: str, query: str)`."""
    return f"{tool.__name__}{_SIGNATURES[tool.__name__]}"


def no_such_tool(call: ToolCall, custom: Sequence[CustomTool] = ()) -> Observation:
    """What a call of an unknown name gives."""
    names = ", ".join([*(t.__name__ for t in TOOLS), *(other.name for other in custom)])
    return failure(NameError(f"name '{call.name}' is not defined; tools: {names}"))


def call_tool(root: Path, call: ToolCall, custom: Sequence[CustomTool] = ()) -> Observation:
    """Run a call in this process, unprotected. `Sandbox.run` is the safe way."""
    for other in custom:
        if other.name == call.name:
            return other.run(root, call)
    tool = _BY_NAME.get(call.name)
    if tool is None:
        return no_such_tool(call, custom)
    try:
        arguments = bind(call.name, _SIGNATURES[call.name], call)
    except TypeError as error:
        return failure(error)
    return tool(root, **arguments)
