"""`calculator`: arithmetic on numbers, by walking the syntax tree. Nothing is evaluated as code."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regrpo.tools.observation import Observation, Status, failure
from regrpo.tools.parameters import Expression

MAX_CHARS = 2000
MAX_BITS = 4096  # of an integer, about 1,200 digits
MAX_ROUND_DIGITS = 100

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "round": round,
    "min": min,
    "max": max,
    "abs": abs,
    "sum": sum,
}
ERRORS = (
    ArithmeticError,
    MemoryError,  # from the parser, for deep nesting
    NameError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def calculator(root: Path, expression: Expression) -> Observation:
    """Arithmetic: + - * / // % **, parentheses, round, min, max, abs, sum.

    Integers are exact; other results have at most 10 significant digits.
    """
    try:
        value = calculate(expression)
    except ERRORS as error:
        return failure(error)
    return Observation(f"{value:.10g}" if isinstance(value, float) else str(value), Status.OK)


def calculate(expression: str, names: Mapping[str, Any] = _FUNCTIONS) -> int | float:
    """The value of an expression.

    Args:
        names: functions of numbers and lists, and numbers, which it may use; a dotted name such as
            ``math.pi`` is one name.

    Raises:
        One of ERRORS.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"expression has {len(expression)} characters; at most {MAX_CHARS}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = _value(ast.parse(expression.strip(), mode="eval").body, names)
    if not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {type(value).__name__}")
    return value


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, names), _value(node.right, names)
        _check_operands(node.op, left, right)
        return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element, names) for element in node.elts]
    if isinstance(node, ast.Call) and _name(node.func) is not None and not node.keywords:
        return _call(_named(node.func, names), [_value(argument, names) for argument in node.args])
    if _name(node) is not None:
        value = _named(node, names)
        if callable(value):
            raise TypeError(f"{_name(node)} is a function; expected a number")
        return value
    raise SyntaxError(f"{type(node).__name__} is not arithmetic")


def _name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _named(node: ast.expr, names: Mapping[str, Any]) -> Any:
    name = _name(node) or ""
    if name not in names:
        raise NameError(f"name '{name}' is not defined")
    return names[name]


def _check_operands(op: ast.operator, left: Any, right: Any) -> None:
    if isinstance(left, list) or isinstance(right, list):
        raise TypeError("operands must be numbers, got list")
    integers = isinstance(left, int) and isinstance(right, int)
    # |left| ** right has more than (bits - 1) * right bits; checked before it is computed.
    if isinstance(op, ast.Pow) and integers and (left.bit_length() - 1) * right > MAX_BITS:
        raise OverflowError(f"integer result has more than {MAX_BITS} bits")


def _call(function: Any, arguments: list[Any]) -> Any:
    if not callable(function):
        raise TypeError(f"{type(function).__name__} is not callable")
    digits = arguments[1] if function is round and len(arguments) == 2 else 0
    if isinstance(digits, int) and abs(digits) > MAX_ROUND_DIGITS:  # round builds 10**digits
        raise ValueError(f"round to at most {MAX_ROUND_DIGITS} digits, got {digits}")
    return _bounded(function(*arguments))


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError(f"integer result has more than {MAX_BITS} bits")
    if isinstance(value, complex):  # a root of a negative number
        raise ValueError("math domain error")
    return value
