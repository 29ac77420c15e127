"""Teachers write the Reflection-of-Thought triplet, grounded in the real observation.

The deterministic one is here. It sees what a reader of the trajectory sees (the failed call, its
observation, the correction) and no more, and cites the observation: the edges that lead from the
wrong argument to the right one, or the line that names the right one, or the error itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from regrpo.tool_calls import Reflection, ToolCall
from regrpo.workspace import WorkspaceFile

_EDGE = re.compile(r"(?:^|\s)(\S+) -> (\S+?)(?=[\s,;]|$)", re.MULTILINE)


def explain(
    error_type: str, failed: ToolCall, observation: str, corrected: ToolCall
) -> Reflection | None:
    """The triplet for a repair, or None if the observation does not tell how to make it.

    Where an argument has the wrong type the error tells of the mistake: it is the evidence.
    """
    pairs = zip(failed.args, corrected.args, strict=False)
    retyped = next((b for a, b in pairs if type(a) is not type(b)), None)
    if failed.name == corrected.name and retyped is not None:
        numbers = [b for b in corrected.args if isinstance(b, int)]
        plan = f"use {retyped if isinstance(retyped, str) else numbers}"
        return Reflection(error_type, _first_line(observation), plan)
    if failed.name != corrected.name or len(failed.args) != len(corrected.args):
        return Reflection(error_type, _first_line(observation), f"use {corrected.name}")
    wrong, right = _difference(failed.args, corrected.args)
    plan = f"use {list(right) if isinstance(right, tuple) else right}"
    path = _follow(observation, wrong, right)
    if path is not None:
        return Reflection(error_type, " -> ".join(path), plan)
    first = _first_line(observation)
    if first.startswith("SyntaxError"):
        return Reflection(error_type, first, plan)
    wanted = str(list(right)) if isinstance(right, tuple) else right
    naming = (line.strip() for line in observation.splitlines()[1:] if _names(line, wanted))
    evidence = next(naming, None)
    return None if evidence is None else Reflection(error_type, evidence, plan)


def long_winded(reflection: Reflection, failed: ToolCall, corrected: ToolCall) -> Reflection:
    """The same repair in more words, as teachers that write freely do: every edge of the way is
    cited by itself, and the plan names what it replaces."""
    names = reflection.evidence.split(" -> ")
    evidence = "; ".join(f"{a} -> {b}" for a, b in pairwise(names)) or reflection.evidence
    wrong: Any = failed.name
    if failed.name == corrected.name:
        pairs = zip(failed.args, corrected.args, strict=False)
        kinds = {type(x) for pair in pairs if pair[0] != pair[1] for x in pair}
        if len(failed.args) != len(corrected.args) or kinds not in ({str}, {int}):
            return replace(reflection, evidence=evidence)  # there is no short name for what changed
        wrong, _ = _difference(failed.args, corrected.args)
    plan = f"{reflection.fix_plan} instead of {list(wrong) if isinstance(wrong, tuple) else wrong}"
    return replace(reflection, evidence=evidence, fix_plan=plan)


def _names(line: str, wanted: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(wanted)}(?![\w.])", line) is not None


def _first_line(observation: str) -> str:
    return observation.strip().splitlines()[0].strip()


def _difference(failed: tuple[Any, ...], corrected: tuple[Any, ...]) -> tuple[Any, Any]:
    """The part of the arguments that changed: a word of a text, or all numbers."""
    changed = [(a, b) for a, b in zip(failed, corrected, strict=True) if a != b]
    wrong, right = changed[0]
    if not isinstance(right, str):
        return (
            tuple(a for a in failed if isinstance(a, int)),
            tuple(b for b in corrected if isinstance(b, int)),
        )
    old, new = wrong.split(), right.split()
    words = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    return words[0] if len(words) == 1 else (wrong, right)


def _follow(observation: str, start: Any, end: Any) -> list[str] | None:
    """The names on the way from ``start`` to ``end`` along ``a -> b`` in the observation."""
    edges = dict(_EDGE.findall(observation))
    path = [start]
    while path[-1] != end:
        if path[-1] not in edges or len(path) > len(edges):
            return None
        path.append(edges[path[-1]])
    return path if len(path) > 1 else None


@dataclass(frozen=True)
class Case:
    """A failure and its repair, as a teacher gets them; `seen` are the observations before, and
    `looking` says that images are shown, on which the repair may be found."""

    question: str
    error_type: str
    failed: ToolCall
    observation: str
    corrected: ToolCall
    workspace: tuple[WorkspaceFile, ...] | Path = ()
    seen: tuple[str, ...] = ()
    looking: bool = False


@dataclass(frozen=True)
class Declined:
    """Why there is no triplet for a case."""

    reason: str


class Teacher(Protocol):
    """Explains failures, a batch at a time."""

    def explain(self, cases: Sequence[Case]) -> list[Reflection | Declined]:
        """A triplet for each case, or why there is none, in order."""
        ...


class GroundedTeacher:
    """`explain` for each case; where what is right was known before, the error is the evidence."""

    def explain(self, cases: Sequence[Case]) -> list[Reflection | Declined]:
        """See `Teacher.explain`."""
        return [self._explain(case) for case in cases]

    def _explain(self, case: Case) -> Reflection | Declined:
        reflection = explain(case.error_type, case.failed, case.observation, case.corrected)
        if reflection is None and case.looking:  # no text names what was seen
            _, right = _difference(case.failed.args, case.corrected.args)
            plan = list(right) if isinstance(right, tuple) else right
            reflection = Reflection(case.error_type, _first_line(case.observation), f"use {plan}")
        if reflection is None:
            return Declined("repair not in the observation")
        known = any(_names(text, reflection.evidence) for text in (case.question, *case.seen))
        error = _first_line(case.observation)
        return replace(reflection, evidence=error) if known else reflection
