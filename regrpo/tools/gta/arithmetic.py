"""GTA's Calculator: Python arithmetic with the functions of ``math``, by walking the syntax tree.

AgentLego evaluates any Python expression; here comparisons, comprehensions and keywords are
errors. The result is shown in full, as Python shows it.
"""

import math
from collections.abc import Callable
from typing import Any

from regrpo.tools.calculator import ERRORS, calculate
from regrpo.tools.observation import Observation, Status, failure

# Unlike arithmetic, these take time or space that does not follow from the size of a number.
_NOT_BOUNDED = {"factorial", "perm", "comb"}
_MAX_ARGUMENT = 1000
_MATH: dict[str, Any] = {
    name: value for name, value in vars(math).items() if not name.startswith("_")
}


def _bounded(name: str) -> Callable[..., Any]:
    function = _MATH[name]

    def call(*arguments: Any) -> Any:
        if any(argument > _MAX_ARGUMENT for argument in arguments):
            raise OverflowError(f"{name} of at most {_MAX_ARGUMENT}")
        return function(*arguments)

    return call


_MATH |= {name: _bounded(name) for name in _NOT_BOUNDED}
NAMES = {
    **_MATH,
    **{f"math.{name}": value for name, value in _MATH.items()},
    "round": round,
    "min": min,
    "max": max,
    "abs": abs,
    "sum": sum,
}


def calculate_text(expression: str) -> Observation:
    """The value as Python writes it, or what is wrong with the expression."""
    try:
        return Observation(str(calculate(expression, NAMES)), Status.OK)
    except ERRORS as error:
        return failure(error)
