"""What the turns of recorded corpora say, where no typed status was kept.

An observation is typed by the words of the harness that ran the code (MAT-Agent's ``Error:``
header) and by what Python prints of an exception, at the places where these stand; a word such as
"error" in an observation means nothing. An assistant turn holds a fenced block of Python
statements, not always one literal call.
"""

import ast
import builtins
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from regrpo.tool_calls import ToolCall
from regrpo.tools import Status
from regrpo.trajectory import Message

_HEADER = re.compile(
    r"\[OUTPUT OF STEP (?P<step>\d+)\](?: ->)? (?P<mark>Observation|Error):[ \t]*\n?"
)
_WRAPPER = re.compile(r"\ACode execution failed due to the following error:\s*")
_ADVICE = re.compile(r"\nNow let's retry: [^\n]*\s*\Z")
_FORMAT = re.compile(r"\AError in code parsing:\s*")
_SERVICE = re.compile(
    r"\A(?:Error code: (?:408|409|425|429|5\d\d)\b|[\w.]*(?:RateLimit|Timeout)\w*:)"
)
_EXCEPTION = re.compile(r"\A\s*(?:[A-Za-z_][\w.]*)?(?:Error|Exception): \S")
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):$", re.MULTILINE)
_EMPTY = re.compile(r"\s*(?:\[\s*\]|\{\s*\}|\(\s*\)|None|''|\"\")?\s*")
_FENCE = re.compile(
    r"```(?:python|py)?[ \t]*\n(?P<code>.*?)\n?^[ \t]*```", re.DOTALL | re.MULTILINE
)
_MARKER = re.compile(r"^[ \t]*\**(?:Thought|Code):\**[ \t]*", re.MULTILINE)


@dataclass(frozen=True)
class RecordedObservation:
    """An observation turn: its step, how it ended (its kind), its text without the frame.

    Kinds: ``ok``; ``empty``; ``execution``, the code raised; ``service``, a remote service refused
    or timed out; ``format``, the harness found no code in the turn.
    """

    step: int | None
    kind: str
    text: str

    @property
    def status(self) -> Status:
        named = {"ok": Status.OK, "empty": Status.EMPTY}
        return named.get(self.kind, Status.ERROR)


def observation(content: str) -> RecordedObservation:
    """Types an observation turn."""
    header = _HEADER.match(content)
    step = int(header["step"]) if header else None
    text = content[header.end() :] if header else content
    if header and header["mark"] == "Error":
        text = _ADVICE.sub("", text)
        parsing = _FORMAT.match(text)
        if parsing:
            return RecordedObservation(step, "format", text[parsing.end() :])
        text = _WRAPPER.sub("", text)
        return RecordedObservation(step, "service" if _SERVICE.match(text) else "execution", text)
    if _SERVICE.match(text):
        return RecordedObservation(step, "service", text)
    if _EXCEPTION.match(text) or _TRACEBACK.search(text):
        return RecordedObservation(step, "execution", text)
    return RecordedObservation(step, "empty" if _EMPTY.fullmatch(text) else "ok", text)


def failed_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant turns whose observation bears the harness's ``Error:`` header."""
    failed = []
    for index, _, after in answered(messages):
        header = _HEADER.match(after)
        if header and header["mark"] == "Error":
            failed.append(index)
    return failed


def answered(messages: Sequence[Message]) -> Iterator[tuple[int, str, str]]:
    """(index, turn, observation) of the assistant turns that a user turn follows."""
    for index, (turn, after) in enumerate(pairwise(messages)):
        if (turn["role"], after["role"]) == ("assistant", "user"):
            yield index, turn["content"], after["content"]


def code_of(content: str) -> str | None:
    """The first fenced block of a turn; None without one."""
    fence = _FENCE.search(content)
    return fence["code"] if fence else None


def normal_code(code: str) -> str:
    """The code without comments and layout, so that equal code compares equal."""
    tree = _parse(code)
    return code.strip() if tree is None else ast.unparse(tree)


def official_layout(content: str) -> str:
    """A turn as ``Thought: ... Code: ...``: bold markers and their like are made plain.

    The turn must hold a fenced block; what follows it is dropped.
    """
    fence = _FENCE.search(content)
    if fence is None:
        raise ValueError(f"no fenced code block in {content[:60]!r}")
    thought = _MARKER.sub("", content[: fence.start()]).strip()
    return f"Thought: {thought}\n\nCode:\n```py\n{fence['code']}\n```"


class Expression(str):
    """The source text of an argument that is no literal."""


def tool_calls(code: str, defined: frozenset[str] = frozenset()) -> list[ToolCall]:
    """The calls of names that are neither builtins nor made by the code, in the order written.

    Args:
        defined: names that earlier code of the same trajectory made.

    A variable that the code sets to a literal counts as that literal; any other argument that is no
    literal comes as an ``Expression``. Code that does not parse calls nothing.
    """
    tree = _parse(code)
    if tree is None:
        return []
    own = made_names(code) | defined
    constants: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, {})
            if not isinstance(value, Expression):
                constants[node.targets[0].id] = value
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id not in own
        and not hasattr(builtins, node.func.id)
    ]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    return [
        ToolCall(
            node.func.id if isinstance(node.func, ast.Name) else "",
            tuple(_value(argument, constants) for argument in node.args),
            {k.arg or "**": _value(k.value, constants) for k in node.keywords},
        )
        for node in calls
    ]


def made_names(code: str) -> frozenset[str]:
    """Functions, classes, imports and variables that the code makes."""
    names: set[str] = set()
    for node in ast.walk(_parse(code) or ast.Module([], [])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


def subjects(code: str) -> set[str]:
    """What the code works on: texts of four characters or more, and variables of earlier steps."""
    nodes = list(ast.walk(_parse(code) or ast.Module([], [])))
    texts = {
        repr(n.value)
        for n in nodes
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) >= 4
    }
    loaded = {n.id for n in nodes if isinstance(n, ast.Name) and not hasattr(builtins, n.id)}
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return texts | (loaded - made_names(code) - called)


def sole_call(code: str) -> ToolCall | None:
    """The literal call whose result is all that the code shows, else None.

    That is ``f(...)``, ``print(f(...))``, or ``x = f(...)`` and then ``print(x)``.
    """
    tree = _parse(code)
    match tree.body if tree else []:
        case [ast.Expr(ast.Call(ast.Name("print"), [ast.Call() as call], []))]:
            pass
        case [ast.Expr(ast.Call() as call)]:
            pass
        case [
            ast.Assign([ast.Name(target)], ast.Call() as call),
            ast.Expr(ast.Call(ast.Name("print"), [ast.Name(shown)], [])),
        ] if target == shown:
            pass
        case _:
            return None
    if not isinstance(call.func, ast.Name) or hasattr(builtins, call.func.id):
        return None
    args = tuple(_value(argument, {}) for argument in call.args)
    kwargs = {k.arg or "**": _value(k.value, {}) for k in call.keywords}
    if any(isinstance(value, Expression) for value in (*args, *kwargs.values())):
        return None
    return ToolCall(call.func.id, args, kwargs)


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():  # an odd escape in a string is no business of ours
            warnings.simplefilter("ignore")
            return ast.parse(code.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        return Expression(ast.unparse(node))
