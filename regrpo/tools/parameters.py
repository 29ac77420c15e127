"""What the arguments of tools mean, beyond their type.

A tool says it in its annotations. The model never sees it: `signature_text` prints the plain types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


class Kind(str, Enum):
    """The meaning of an argument."""

    PATH = "path"  # of a file or folder in the workspace
    COORDINATE = "coordinate"  # four in a row are a box: left, top, right, bottom
    QUERY = "query"  # words to look for
    STATEMENT = "statement"  # a query in a formal language
    EXPRESSION = "expression"  # arithmetic
    ANSWER = "answer"  # ends the episode


PathText = Annotated[str, Kind.PATH]
Coordinate = Annotated[int, Kind.COORDINATE]
Query = Annotated[str, Kind.QUERY]
Statement = Annotated[str, Kind.STATEMENT]
Expression = Annotated[str, Kind.EXPRESSION]
Answer = Annotated[str, Kind.ANSWER]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a tool; `kind` is None where the tool does not say what it means."""

    name: str
    type: Any
    kind: Kind | None
    required: bool


@cache
def typed_parameters(tool: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a tool without the workspace root."""
    hints = get_type_hints(tool, include_extras=True)
    parameters = []
    for p in list(inspect.signature(tool).parameters.values())[1:]:
        hint, kind = hints[p.name], None
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            kind = next((extra for extra in extras if isinstance(extra, Kind)), None)
        parameters.append(Parameter(p.name, hint, kind, p.default is inspect.Parameter.empty))
    return tuple(parameters)
