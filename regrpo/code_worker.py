"""The process that runs one piece of code for `regrpo.code_runner`, contained.

It reads ``{code, kind, timeout_s, memory_mb}`` as JSON from stdin, imports what the code may use,
sets the walls (`regrpo.containment`), says ``READY``, calls the code's ``solution()`` and writes
``{ok, text}`` as JSON to what was stdout; ``text`` of a plot is a PNG in base64.

Imports and names of the code are checked as well, so that an attempt ends with a clear error; what
keeps it in are the walls.
"""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from regrpo.containment import contain

IMPORTS = (
    "cmath", "collections", "datetime", "decimal", "fractions", "functools", "itertools", "math",
    "matplotlib", "mpl_toolkits", "mpmath", "numpy", "operator", "random", "re", "statistics",
    "string", "sympy", "typing",
)  # fmt: skip
_FORBIDDEN = (
    "open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "help", "memoryview",
)  # fmt: skip
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/fonts")
MAX_TEXT, MAX_PNG = 100_000, 16 * 2**20
READY = b"\n"


def main(cache: str) -> None:
    """Serves one request; ``cache`` is matplotlib's folder."""
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # what the code prints goes nowhere
        os.dup2(nowhere, fd)
    modules = _preload(request["kind"])
    readable = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    readable |= {Path(str(m.__file__)).parents[1] for m in modules}
    readable |= {Path(folder) for folder in (*_LIBRARIES, cache)}
    contain(
        sorted(folder for folder in readable if folder.is_dir()),
        memory_bytes=request["memory_mb"] * 2**20,
        cpu_s=math.ceil(time.process_time()) + request["timeout_s"],
    )
    answer.write(READY)
    answer.flush()
    try:
        result = _run(request["code"], request["kind"])
    # The code may raise anything, SystemExit and KeyboardInterrupt too.
    except BaseException as error:
        result = {"ok": False, "text": _describe(error)}
    answer.write(json.dumps(result).encode())
    answer.flush()
    os._exit(0)  # no handlers that the code may have registered


def _describe(error: BaseException) -> str:
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException:  # the code's own class
        message = "(no message)"
    return f"{type(error).__name__}: {message}"[:MAX_TEXT]


def _preload(kind: str) -> list[ModuleType]:
    """Imports the libraries: they want threads, caches and devices that the code does not get."""
    import mpmath
    import numpy
    import sympy

    if kind == "text":
        return [sympy, mpmath, numpy]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Drawing once loads fonts and codecs.
    figure = plt.figure()
    figure.text(0, 0, "$x^2$")
    figure.savefig(io.BytesIO(), format="png")
    plt.close("all")
    return [sympy, mpmath, numpy, matplotlib]


def _run(code: str, kind: str) -> dict[str, Any]:
    tree = ast.parse(code)
    _check(tree)
    allowed = {k: v for k, v in vars(builtins).items() if k not in _FORBIDDEN}
    allowed["__import__"] = _import
    names: dict[str, Any] = {"__builtins__": allowed, "__name__": "solution"}
    exec(compile(tree, "<code>", "exec"), names)
    if not callable(names.get("solution")):
        raise NameError("the code defines no function 'solution'")
    value = names["solution"]()
    if kind == "text":
        return {"ok": True, "text": str(value)[:MAX_TEXT]}
    from matplotlib.figure import Figure

    if not isinstance(value, Figure):
        raise TypeError(f"solution() gave {type(value).__name__}; expected a matplotlib figure")
    buffer = io.BytesIO()
    value.savefig(buffer, format="png")
    if buffer.tell() > MAX_PNG:
        raise ValueError(f"the figure has {buffer.tell()} bytes; at most {MAX_PNG}")
    return {"ok": True, "text": base64.b64encode(buffer.getvalue()).decode()}


def _check(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        names: list[str | None] = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                _require_import(alias.name)
        elif isinstance(node, ast.ImportFrom):
            _require_import(node.module or ".")
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        for name in names:
            if name and name.startswith("__") and name.endswith("__"):
                raise NameError(f"'{name}' may not be used")
            if isinstance(node, ast.Name) and name in _FORBIDDEN:
                raise NameError(f"'{name}' may not be used")


def _require_import(module: str) -> None:
    if module.split(".")[0] not in IMPORTS:
        raise ImportError(f"'{module}' may not be imported; allowed: {', '.join(IMPORTS)}")


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    _require_import(name)
    return builtins.__import__(name, *args, **kwargs)
