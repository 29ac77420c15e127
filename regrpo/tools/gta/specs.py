"""Names, parameters and outputs of the GTA tools (open-compass/GTA, ``toolmeta``)."""

import inspect
from dataclasses import dataclass
from typing import Any

from regrpo.tool_calls import ToolCall
from regrpo.tools.custom import bind

CATEGORIES = ("perception", "operation", "logic", "creativity")


@dataclass(frozen=True)
class GtaTool:
    """One tool.

    Attributes:
        category: one of ``CATEGORIES``.
        output: "text" or "image"; an image is given as the path of a file.
        images: the parameters that take the path of an image.
    """

    name: str
    category: str
    output: str
    summary: str
    signature: inspect.Signature
    images: tuple[str, ...]

    def describe(self) -> str:
        """A line for the system prompt."""
        return f"{self.name}{self.signature}: {self.summary}"

    def bind(self, call: ToolCall, *, defaults: bool = True) -> dict[str, Any]:
        """The arguments by name. Raises TypeError, fit to be shown to the model."""
        given = bind(self.name, self.signature, call)
        if not defaults:
            return given
        parameters = self.signature.parameters.values()
        return {p.name: given.get(p.name, p.default) for p in parameters}


def _tool(name: str, category: str, output: str, summary: str, **parameters: Any) -> GtaTool:
    """Parameters are types, or (type, default)."""
    made = []
    for key, given in parameters.items():
        kind, default = given if isinstance(given, tuple) else (given, inspect.Parameter.empty)
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        made.append(inspect.Parameter(key, positional, default=default, annotation=kind))
    images = tuple(key for key in parameters if key == "image")
    return GtaTool(name, category, output, summary, inspect.Signature(made), images)


_ALL = (
    _tool("OCR", "perception", "text", "Text on an image, with boxes (x1, y1, x2, y2).", image=str),
    _tool("ImageDescription", "perception", "text", "A short description.", image=str),
    _tool(
        "RegionAttributeDescription",
        "perception",
        "text",
        "An attribute of the region (x1, y1, x2, y2).",
        image=str,
        bbox=str,
        attribute=str,
    ),
    _tool(
        "TextToBbox",
        "perception",
        "text",
        "Boxes and scores of the described object; top1 gives the best one only.",
        image=str,
        text=str,
        top1=(bool, True),
    ),
    _tool(
        "DrawBox",
        "operation",
        "image",
        "Draws a box (x1, y1, x2, y2), with a text if wanted.",
        image=str,
        bbox=str,
        annotation=(str | None, None),
    ),
    _tool(
        "AddText",
        "operation",
        "image",
        "Writes at (x, y), the left bottom corner, or at two letters of l m r and t m b.",
        image=str,
        text=str,
        position=str,
        color=(str, "red"),
    ),
    _tool("GoogleSearch", "operation", "text", "The first k results.", query=str, k=(int, 10)),
    _tool(
        "Calculator",
        "logic",
        "text",
        "A Python expression; functions of math need no import.",
        expression=str,
    ),
    _tool(
        "Solver",
        "logic",
        "text",
        "Python code with a function solution() that solves with sympy and returns a str.",
        command=str,
    ),
    _tool(
        "Plot",
        "logic",
        "image",
        "Python code with a function solution() that returns a matplotlib figure.",
        command=str,
    ),
    _tool("MathOCR", "logic", "text", "A formula on an image, as LaTeX.", image=str),
    _tool("CountGivenObject", "logic", "text", "How many there are.", image=str, text=str),
    _tool("TextToImage", "creativity", "image", "Draws from keywords.", keywords=str),
    _tool(
        "ImageStylization",
        "creativity",
        "image",
        "Changes an image as told.",
        image=str,
        instruction=str,
    ),
)
GTA_TOOLS = {tool.name: tool for tool in _ALL}
