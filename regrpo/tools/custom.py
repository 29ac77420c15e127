"""A user's Python functions as tools.

A tool is a function with typed parameters and a docstring, whose first line the model is shown::

    def convert(amount: float, currency: str) -> float:
        '''Converts an amount in euro into another currency.'''

What it returns is shown as text. Nothing (None, or something of length 0) is an empty observation
and an exception is a failed one; both open a reflection. A parameter of type ``Path`` receives the
folder of the task and is not shown.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from regrpo.tool_calls import ToolCall
from regrpo.tools.observation import Observation, Status, failure

_PLAIN = (str, int, float, bool, NoneType)
_CONTAINERS = (list, tuple, dict)


@dataclass(frozen=True)
class CustomTool:
    """A function, and what the model may call it with.

    ``signature`` is what the model sees; ``folder`` the parameter that receives the task's folder.
    """

    function: Callable[..., Any]
    name: str
    signature: inspect.Signature
    folder: str | None
    summary: str

    def describe(self) -> str:
        """A line for the system prompt, such as `convert(amount: float): Converts an amount.`"""
        return f"{self.name}{self.signature}" + (f": {self.summary}" if self.summary else "")

    def run(self, root: Path, call: ToolCall) -> Observation:
        """Runs a call in this process; whatever goes wrong in it is its observation."""
        try:
            arguments = bind(self.name, self.signature, call)
            if self.folder is not None:
                arguments[self.folder] = root
            value = self.function(**arguments)
            if isinstance(value, Observation):
                return value
            empty = value is None or (hasattr(value, "__len__") and len(value) == 0)
            return Observation("(no output)" if empty else str(value), _STATUS[empty])
        except Exception as error:  # the user's code may raise anything
            return failure(error)


_STATUS = {True: Status.EMPTY, False: Status.OK}


def custom_tools(functions: Iterable[Callable[..., Any]], taken: Iterable[str]) -> list[CustomTool]:
    """Reads the signatures of functions.

    Args:
        taken: names that other tools have.

    Raises:
        TypeError: something is not a plain function with typed parameters. ValueError: a name is
            taken.
    """
    tools, names = [], set(taken)
    for function in functions:
        tool = _custom_tool(function)
        if tool.name in names:
            raise ValueError(f"tool {tool.name}: another tool has this name; expected a new one")
        names.add(tool.name)
        tools.append(tool)
    return tools


def _custom_tool(function: Callable[..., Any]) -> CustomTool:
    name = getattr(function, "__name__", "")
    if not callable(function) or isinstance(function, type) or not name.isidentifier():
        raise TypeError(f"tool {function!r:.80}; expected a function with a name")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"tool {name} is asynchronous or a generator; expected a plain function")
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise TypeError(f"tool {name}: {error}; expected types that can be looked up") from error
    shown, folders = [], []
    for parameter in inspect.signature(function).parameters.values():
        where = f"tool {name}: parameter '{parameter.name}'"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{where} is {parameter.kind.description}; expected a plain one")
        hint = hints.get(parameter.name)
        if hint is Path:
            folders.append(parameter.name)
        elif parameter.name not in hints or not _writable(hint):
            given = f"type {type_name(hint)}" if parameter.name in hints else "no type"
            raise TypeError(
                f"{where} has {given}; expected one that a call can write: str, int, float, bool, "
                "list, tuple, dict, Literal, Any, a union of those, or Path for the task's folder"
            )
        else:
            shown.append(parameter.replace(annotation=hint))
    if len(folders) > 1:
        raise TypeError(f"tool {name}: {' and '.join(folders)} are folders; expected at most one")
    summary = (inspect.getdoc(function) or "").split("\n")[0]
    return CustomTool(function, name, inspect.Signature(shown), next(iter(folders), None), summary)


def bind(name: str, signature: inspect.Signature, call: ToolCall) -> dict[str, Any]:
    """The arguments of a call by name. Raises TypeError, fit to be shown to the model."""
    try:
        arguments = signature.bind(*call.args, **call.kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None
    for key, value in arguments.items():
        expected = signature.parameters[key].annotation
        if not accepts(expected, value):
            raise TypeError(
                f"{name}() argument '{key}' must be {type_name(expected)}, "
                f"not {type(value).__name__}"
            )
    return arguments


def type_name(hint: Any) -> str:
    """A type as it is written in code."""
    return str(inspect.formatannotation(hint))


def accepts(hint: Any, value: Any) -> bool:
    """Whether a literal is of a type, exactly: True is no int. An int is a float as well."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(accepts(option, value) for option in inner)
    if kind is Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if kind is None:
        return value is None
    if kind is float:
        return type(value) in (int, float)
    if type(value) is not kind or not inner:
        return type(value) is kind
    if kind is dict:
        return all(accepts(inner[0], k) and accepts(inner[1], v) for k, v in value.items())
    if kind is tuple and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(accepts, inner, value))
    return all(accepts(inner[0], item) for item in value)


def _writable(hint: Any) -> bool:
    """Whether every value of a type can stand in a call."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return all(type(option) in _PLAIN for option in inner)
    if kind in (Union, UnionType, *_CONTAINERS):
        return all(option is Ellipsis or _writable(option) for option in inner)
    return kind is Any or kind is None or kind in _PLAIN
