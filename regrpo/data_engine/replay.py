"""Recorded trajectories as an environment, for corpora whose tools are not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regrpo.data_engine.recorded import answered, code_of, normal_code, observation, sole_call
from regrpo.environment import Workspace
from regrpo.records import Record
from regrpo.tool_calls import ToolCall
from regrpo.tools import Observation, Status, failure
from regrpo.tools.answer import final_answer


class NotRecordedError(LookupError):
    """A call that the record does not hold."""


@dataclass(frozen=True)
class ReplayedObservation(Observation):
    """An observation that was recorded, not made."""

    provenance: str = "recorded"


class ReplayEnvironment:
    """Answers a turn by what its record holds for the same tool name and arguments.

    A recorded turn of several statements is answered as a whole, whatever its comments and layout.
    A call that was recorded more than once is answered by its last observation. ``final_answer``
    needs no record. Anything else is a ``NotRecordedError`` observation.

    Args:
        records: the record that stands for each workspace, say ``{Path(r["id"]): r for r in ...}``.
    """

    def __init__(self, records: Mapping[Workspace, Record]):
        self._answers = {workspace: _answers(record) for workspace, record in records.items()}

    def execute(self, requests: Sequence[tuple[Workspace, str]]) -> list[Observation]:
        """See `regrpo.environment.Environment`. KeyError for a workspace without a record."""
        return [self._answer(self._answers[workspace], text) for workspace, text in requests]

    def _answer(self, answers: dict[str, Observation], text: str) -> Observation:
        code = code_of(text)
        if code is None:
            return failure(SyntaxError("no code block; expected Code: and one tool call"))
        call = sole_call(code)
        found = answers.get(_key(code, call))
        if found is not None:
            return found
        if call is not None and call.name == "final_answer" and len(call.args) == 1:
            return final_answer(Path(), str(call.args[0]))
        what = call.name if call else "this code"
        return failure(NotRecordedError(f"{what} was not recorded with these arguments"))


def _answers(record: Record) -> dict[str, Observation]:
    answers: dict[str, Observation] = {}
    for _, turn, after in answered(record["conversations"]):
        code = code_of(turn)
        if code is not None:
            seen = observation(after)
            answers[_key(code, sole_call(code))] = ReplayedObservation(seen.text, seen.status)
    meta = record.get("rot_meta")
    code = code_of(meta["failed_action"]) if meta else None
    if meta and code is not None:
        # A tool that fails without an exception leaves no type; the record says that it failed.
        seen = observation(meta["failed_observation"])
        status = Status.ERROR if seen.status is Status.OK else seen.status
        answers[_key(code, sole_call(code))] = ReplayedObservation(seen.text, status)
    return answers


def _key(code: str, call: ToolCall | None) -> str:
    if call is None:
        return normal_code(code)
    keywords = {name: call.kwargs[name] for name in sorted(call.kwargs)}
    return ToolCall(call.name, call.args, keywords).render()
