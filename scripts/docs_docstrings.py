"""Griffe extension for the API pages: `a, b: what they are` in a docstring is an entry for each."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<=\n)(?:Args|Attributes):\n(?:(?: {4}.*)?\n)*(?: {4}.*)?")
SHARED = re.compile(r"^ {4}(\w+(?:, \w+)+)(:.*(?:\n {5,}.*)*)", re.MULTILINE)


def _each(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}{entry[2]}" for name in entry[1].split(", "))


class OneEntryEach(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = "\n" + obj.docstring.value
            obj.docstring.value = SECTION.sub(lambda s: SHARED.sub(_each, s[0]), text)[1:]
