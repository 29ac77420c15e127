"""The tools an agent can call. Each is a plain function `(root, *arguments) -> Observation`.

Nothing here writes to the workspace. Failures are observations whose text begins with the class and
message of the exception that was really raised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from regrpo.tool_calls import ToolCall
from regrpo.tools.answer import final_answer
from regrpo.tools.calculator import calculator
from regrpo.tools.files import list_dir, read_file
from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.page import read_region
from regrpo.tools.search import search
from regrpo.tools.sql import sql

__all__ = ["TOOLS", "Observation", "Status", "call_tool", "signature_text"]

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
_BY_NAME = {tool.__name__: tool for tool in TOOLS}


def _public_signature(tool: Tool) -> inspect.Signature:
    """The signature the model sees: resolved types, without the workspace root."""
    hints = get_type_hints(tool)
    parameters = list(inspect.signature(tool).parameters.values())[1:]
    return inspect.Signature([p.replace(annotation=hints[p.name]) for p in parameters])


_SIGNATURES = {name: _public_signature(tool) for name, tool in _BY_NAME.items()}


def signature_text(tool: Tool) -> str:
    """A tool's name and typed arguments, such as `sql(database: str, query: str)`."""
    return f"{tool.__name__}{_SIGNATURES[tool.__name__]}"


def call_tool(root: Path, call: ToolCall) -> Observation:
    """Run a call in this process, unprotected. `Sandbox.run` is the safe way."""
    tool = _BY_NAME.get(call.name)
    if tool is None:
        names = ", ".join(_BY_NAME)
        return failure(NameError(f"name '{call.name}' is not defined; tools: {names}"))
    try:
        arguments = _bind(call)
    except TypeError as error:
        return failure(error)
    return tool(root, **arguments)


def _bind(call: ToolCall) -> dict[str, Any]:
    signature = _SIGNATURES[call.name]
    try:
        arguments = signature.bind(*call.args, **call.kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{call.name}() {error}") from None
    for name, value in arguments.items():
        expected = signature.parameters[name].annotation
        if type(value) is not expected:  # not isinstance: True is no coordinate
            raise TypeError(
                f"{call.name}() argument '{name}' must be {expected.__name__}, "
                f"not {type(value).__name__}"
            )
    return arguments
