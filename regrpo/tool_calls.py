"""The text of one agent turn: an optional reflection, a thought, and one tool call as Python.

The layout is that of the official ReGRPO records (arXiv 2606.31392)::

    Reflection:
    - ErrorType: ArgInvalid
    - Evidence: ...
    - FixPlan: ...
    Thought: ...

    Code:
    ```py
    read_file("notes.txt")
    ```

A call is one call of a plain name with literal arguments. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

ERROR_TYPES = ("GroundingDrift", "ToolMismatch", "ArgInvalid", "InfoInsufficient")
MAX_CODE_CHARS = 20_000

_REFLECTION_START = re.compile(r"^[ \t]*(Reflection:)", re.MULTILINE)
_THOUGHT_START = re.compile(r"^[ \t]*(Thought:)", re.MULTILINE)
_REFLECTION = re.compile(
    r"[ \t]*Reflection:\s*"
    r"-[ \t]*ErrorType:(?P<error_type>[^\n]*)\s*"
    r"\n[ \t]*-[ \t]*Evidence:(?P<evidence>[^\n]*)\s*"
    r"\n[ \t]*-[ \t]*FixPlan:(?P<fix_plan>[^\n]*)(?:\n|\Z)"
)
_CODE = re.compile(
    r"^[ \t]*Code:\s*```(?:python|py)?[ \t]*\n(?P<code>.*?)\n?^[ \t]*```", re.MULTILINE | re.DOTALL
)
# A line that begins like this inside a thought would be read as the next part of the turn.
_MARKER_LINE = re.compile(r"^[ \t]*(?:Reflection:|Thought:|Code:|```)", re.MULTILINE)


class ToolCallError(ValueError):
    """A turn that cannot be executed; the message is fit to be shown to the model."""


@dataclass(frozen=True)
class ToolCall:
    """A tool's name and literal arguments: str, int, float, bool, None, list, tuple or dict."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """One line of Python, strings in double quotes; `parse_call` gives an equal call back."""
        keywords = (f"{name}={_literal(value)}" for name, value in self.kwargs.items())
        return f"{self.name}({', '.join([*map(_literal, self.args), *keywords])})"


@dataclass(frozen=True)
class Reflection:
    """The Reflection-of-Thought triplet. Each field is one line without white space around it."""

    error_type: str
    evidence: str
    fix_plan: str

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value != value.strip() or "\n" in value:
                raise ValueError(f"{name} must be one line, without white space around: {value!r}")

    def render(self) -> str:
        """The block of four lines that `reflection_span` finds and `parse_turn` reads."""
        return (
            f"Reflection:\n- ErrorType: {self.error_type}\n- Evidence: {self.evidence}\n"
            f"- FixPlan: {self.fix_plan}\n"
        )


@dataclass(frozen=True)
class Turn:
    """One assistant turn. No line of the thought may begin like another part of the turn."""

    reflection: Reflection | None
    thought: str
    call: ToolCall

    def __post_init__(self) -> None:
        if self.thought != self.thought.strip() or _MARKER_LINE.search(self.thought):
            raise ValueError(
                "thought must have no white space around it and no line that begins with "
                f"Reflection:, Thought:, Code: or ```: {self.thought!r}"
            )

    def render(self) -> str:
        """The text of the turn; `parse_turn` gives an equal turn back."""
        reflection = self.reflection.render() if self.reflection else ""
        return f"{reflection}Thought: {self.thought}\n\nCode:\n```py\n{self.call.render()}\n```"


def parse_turn(text: str) -> Turn:
    """Parse a turn; the thought may be missing and the fence may be py, python or bare.

    Raises ToolCallError for anything else. What follows the code block is ignored.
    """
    code = _CODE.search(text)
    if code is None:
        raise ToolCallError("no code block; expected Code: and one tool call between ```py and ```")
    if _CODE.search(text, code.end()):
        raise ToolCallError("more than one code block; expected one tool call a turn")
    reflection, rest = _split_reflection(text[: code.start()])
    thought = re.sub(r"\A\s*Thought:", "", rest).strip()
    if _MARKER_LINE.search(thought):
        raise ToolCallError("expected one Thought: and then Code: with one tool call")
    return Turn(reflection, thought, parse_call(code["code"]))


def parse_call(code: str) -> ToolCall:
    """Parse Python source holding one call of a plain name with literal arguments.

    Raises ToolCallError for anything else.
    """
    if len(code) > MAX_CODE_CHARS:
        raise ToolCallError(f"code has {len(code)} characters; at most {MAX_CODE_CHARS} are read")
    try:
        with warnings.catch_warnings():  # an odd escape in a string is no business of the trainer
            warnings.simplefilter("ignore")
            body = ast.parse(code.strip()).body
    except SyntaxError as error:
        raise ToolCallError(error.msg) from error
    except (ValueError, RecursionError, MemoryError) as error:  # NUL, surrogates, deep nesting
        raise ToolCallError(str(error) or "code is nested too deeply") from error
    call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ToolCallError("expected exactly one call of a tool, such as tool(argument)")
    args = tuple(_evaluate(argument) for argument in call.args)
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ToolCallError("** is not allowed; write each argument as name=value")
        if keyword.arg in kwargs:
            raise ToolCallError(f"keyword argument repeated: {keyword.arg}")
        kwargs[keyword.arg] = _evaluate(keyword.value)
    return ToolCall(call.func.id, args, kwargs)


def reflection_span(text: str) -> tuple[int, int] | None:
    """Characters `[start, end)` of the reflection block, None without one.

    It runs from `Reflection:` up to `Thought:`, to the end of the text if that never comes.
    """
    start = _REFLECTION_START.search(text)
    if start is None:
        return None
    end = _THOUGHT_START.search(text, start.end())
    return start.start(1), end.start(1) if end else len(text)


def _split_reflection(head: str) -> tuple[Reflection | None, str]:
    start = _REFLECTION_START.search(head)
    if start is None:
        return None, head
    match = _REFLECTION.match(head, start.start())
    if match is None or head[: start.start()].strip():
        raise ToolCallError(
            "a reflection comes first and has the lines - ErrorType:, - Evidence:, - FixPlan:"
        )
    return Reflection(*(value.strip() for value in match.groups())), head[match.end() :]


def _evaluate(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
        _literal(value)  # refuses sets, bytes and complex numbers
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolCallError(
            "arguments must be literals: strings, numbers, True, False, None, lists, dicts"
        ) from error
    return value


def _literal(value: Any) -> str:
    if isinstance(value, str):
        # With a double quote in front, repr chooses single quotes and escapes only those.
        body = repr('"' + value)[2:-1].replace("\\'", "'").replace('"', '\\"')
        return f'"{body}"'
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("nan has no Python literal")
        return repr(value).replace("inf", "1e999")
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    raise TypeError(f"a tool argument must be a literal, got {type(value).__name__}")
