"""Sends a user's tools to the sandbox, which is an interpreter of its own.

A tool goes by value: its code, and the globals and closure that it uses, and so on for functions
of its own module. The sandbox need not import that module, which may be a script or a notebook, or
load a model. What other modules define goes by name.
"""

from __future__ import annotations

import builtins
import dis
import importlib
import io
import marshal
import pickle
import sys
from collections.abc import Iterator, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from regrpo.tools.custom import CustomTool


def ship(tools: Sequence[CustomTool]) -> bytes:
    """Tools as bytes for `unship` in another process of this Python.

    Raises:
        ValueError: a tool uses something that cannot be sent; the message names both.
    """
    shipped = []
    for tool in tools:
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, tool).dump(tool)
        except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"tool {tool.name} cannot be sent to the sandbox: {error}; define what it uses in "
                "a module, or pass it in local_tools"
            ) from error
        shipped.append(buffer.getvalue())
    return pickle.dumps(shipped)


def unship(data: bytes) -> list[CustomTool]:
    """What `ship` was given."""
    return [pickle.loads(tool) for tool in pickle.loads(data)]


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, tool: CustomTool) -> None:
        super().__init__(buffer)
        self._home = getattr(tool.function, "__module__", None)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return importlib.import_module, (value.__name__,)
        if isinstance(value, type) and value.__module__ == "__main__":
            raise ValueError(f"class {value.__name__} is defined in the script itself")
        if not isinstance(value, FunctionType):
            return NotImplemented
        if value.__module__ != self._home and _importable(value):
            return NotImplemented
        cells = value.__closure__ or ()
        state = {
            "globals": {
                name: value.__globals__[name]
                for name in _global_names(value.__code__)
                if name in value.__globals__
            },
            "defaults": (value.__defaults__, value.__kwdefaults__),
            "cells": [cell.cell_contents for cell in cells],
        }
        code = marshal.dumps(value.__code__)
        # In two steps, because a function may be among its own globals.
        return _function, (code, value.__name__, len(cells)), state, None, None, _fill


def _importable(function: FunctionType) -> bool:
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _global_names(code: CodeType) -> Iterator[str]:
    """The globals that a function reads, and the functions inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _function(code: bytes, name: str, cells: int) -> FunctionType:
    closure = tuple(CellType() for _ in range(cells))
    module = {"__builtins__": builtins, "__name__": name}
    return FunctionType(marshal.loads(code), module, name, None, closure)


def _fill(function: FunctionType, state: dict[str, Any]) -> None:
    function.__globals__.update(state["globals"])
    function.__defaults__, function.__kwdefaults__ = state["defaults"]
    for cell, content in zip(function.__closure__ or (), state["cells"], strict=True):
        cell.cell_contents = content
