"""Natural recoveries: a real failure in a recorded trajectory, and the step that repaired it.

A failure is an assistant turn whose observation is typed as one (`recorded.observation`). It counts
as repaired if the very next step works (its observation is ok, or it gives the final answer of a
trajectory that is not marked wrong) and is related to the failed one: it calls the same tool with
other arguments, or another tool on the same subject (a text or an earlier variable that both turns
use), or it holds the code block that the failed turn lacked. Going on without any tool is no repair
(MAT-Agent's policy makes up what a search refused to give), nor is repeating the call.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrpo import provenance
from regrpo.config import DataMineConfig
from regrpo.data_engine.exchange import Report, missing_files, read_files
from regrpo.data_engine.recorded import (
    Expression,
    RecordedObservation,
    code_of,
    made_names,
    normal_code,
    observation,
    official_layout,
    subjects,
    tool_calls,
)
from regrpo.data_engine.teacher import explain
from regrpo.records import Record, write_atomically, write_records
from regrpo.tool_calls import Reflection, ToolCall

REPORT = "mine_report.json"
REPAIRS = ("same tool", "other tool", "code block")


@dataclass(frozen=True)
class Recovery:
    """A failure and what came of it.

    Attributes:
        turn: index of the failed assistant turn.
        seen: its observation.
        outcome: one of ``REPAIRS``, or why it is no repair.
        calls: the failed and the corrected call, where both turns make one.
    """

    record: Record
    turn: int
    seen: RecordedObservation
    outcome: str
    calls: tuple[ToolCall, ToolCall] | None = None

    @property
    def repaired(self) -> bool:
        """A refusing service teaches nothing about the call, so its repairs do not count."""
        return self.outcome in REPAIRS and self.seen.kind != "service"


def recoveries(record: Record) -> list[Recovery]:
    """Every failure of a trajectory; none of a record that tells of its failure already."""
    if "rot_meta" in record:
        return []
    found = []
    messages = record["conversations"]
    defined: frozenset[str] = frozenset()
    for turn, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        seen = observation(messages[turn + 1]["content"])
        if seen.kind != "ok" and messages[turn + 1]["role"] == "user":
            outcome, calls = _outcome(record, turn, seen, defined)
            found.append(Recovery(record, turn, seen, outcome, calls))
        defined |= made_names(code_of(message["content"]) or "")
    return found


def _outcome(
    record: Record, turn: int, seen: RecordedObservation, defined: frozenset[str]
) -> tuple[str, tuple[ToolCall, ToolCall] | None]:
    messages = record["conversations"]
    if len(messages) <= turn + 2 or messages[turn + 2]["role"] != "assistant":
        return "the trajectory ends", None
    code = code_of(messages[turn + 2]["content"])
    failed_code = code_of(messages[turn]["content"])
    if not _works(record, turn + 2):
        return "the next step fails as well", None
    if code is None:
        return "the next step has no code", None
    if seen.kind == "format":
        return "code block", None
    if failed_code is None:
        return "the failed step has no code", None
    if normal_code(code) == normal_code(failed_code):
        return "repeated", None
    # A trajectory's own functions are no tools, its earlier variables are not made by this step.
    failed = [c for c in tool_calls(failed_code, defined) if c.name != "final_answer"]
    corrected = [
        c for c in tool_calls(code, defined | made_names(failed_code)) if c.name != "final_answer"
    ]
    for one in failed:
        for other in corrected:
            if one.name == other.name:
                return ("repeated", None) if one == other else ("same tool", (one, other))
    if not corrected or not failed:
        return "went on without a tool", None
    if subjects(failed_code) & subjects(code):
        return "other tool", (failed[0], corrected[0])
    return "another call on another subject", None


def _works(record: Record, turn: int) -> bool:
    messages = record["conversations"]
    if turn + 1 < len(messages):
        return observation(messages[turn + 1]["content"]).kind == "ok"
    code = code_of(messages[turn]["content"])
    answers = [c for c in tool_calls(code or "") if c.name == "final_answer"]
    return bool(answers) and str(record.get("correct", "yes")).lower() in ("yes", "true", "1")


def error_type(failed: ToolCall, corrected: ToolCall) -> str:
    """The type of the mistake, from what the correction changed."""
    if failed.name != corrected.name:
        return "ToolMismatch"
    before, after = _arguments(failed), _arguments(corrected)
    if set(after) > set(before):
        return "InfoInsufficient"
    changed = [value for key, value in after.items() if before.get(key) != value]
    return "GroundingDrift" if changed and all(map(_is_place, changed)) else "ArgInvalid"


def _arguments(call: ToolCall) -> dict[Any, Any]:
    return {**dict(enumerate(call.args)), **call.kwargs}


def _is_place(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(_is_place, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ground(recovery: Recovery) -> Reflection | None:
    """The deterministic teacher's triplet; None if the observation does not tell the repair."""
    if recovery.calls is None or not recovery.seen.text.strip():
        return None
    failed, corrected = recovery.calls
    kind = error_type(failed, corrected)
    before, after = _arguments(failed), _arguments(corrected)
    if failed.name == corrected.name:
        # It reads positions, and knows texts and whole numbers.
        changed = [key for key in after if before.get(key) != after[key]]
        if set(before) != set(after) or not changed:
            return None
        if any(isinstance(after[key], Expression) for key in changed):
            return None
        if {type(v) for key in changed for v in (before[key], after[key])} not in ({str}, {int}):
            return None
    calls = (ToolCall(c.name, tuple(a.values())) for c, a in ((failed, before), (corrected, after)))
    wrong, right = calls
    return explain(kind, wrong, recovery.seen.text, right)


def pending_record(recovery: Recovery) -> Record:
    """A repaired failure without a reflection yet: ``regrpo.pending`` holds what a teacher needs.

    The corrected turn is brought into the official layout. Behind it, the conversation goes on
    until the next failure, so that no other failed step is in the record's future.
    """
    record, turn = recovery.record, recovery.turn
    messages = [dict(m) for m in record["conversations"]]
    later = [r.turn for r in recoveries(record) if r.turn > turn]
    if later:
        end = max(i for i in range(later[0]) if messages[i]["role"] == "assistant") + 1
        messages = messages[:end]
    corrected = official_layout(messages[turn + 2]["content"])
    messages[turn + 2]["content"] = corrected
    # An empty observation keeps the sign that it is empty; white space around says nothing.
    pending: dict[str, Any] = {
        "turn": turn,
        "step_index": recovery.seen.step or 0,
        "kind": recovery.seen.kind,
        "relation": recovery.outcome,
        "error_type": error_type(*recovery.calls) if recovery.calls else None,
        "failed_action": messages[turn]["content"],
        "failed_observation": recovery.seen.text.strip(),
        "corrected_action": corrected,
    }
    kept = {k: v for k, v in record.items() if k != provenance.KEY}
    origin = provenance.provenance(record) or "recorded"
    return {
        **kept,
        "id": f"{record['id']}_rot{turn}",
        "conversations": messages,
        provenance.KEY: {"provenance": origin, "failure": origin, "pending": pending},
    }


def complete(record: Record, reflection: Reflection) -> Record:
    """A pending record with its reflection: the triplet opens the corrected turn."""
    block = dict(record[provenance.KEY])
    pending = block.pop("pending")
    messages = [dict(m) for m in record["conversations"]]
    turn = messages[pending["turn"] + 2]
    turn["content"] = reflection.render() + turn["content"]
    block["mined"] = {key: pending[key] for key in ("kind", "relation")}
    return {
        **record,
        "conversations": messages,
        "rot_meta": {
            "src_id": record["id"].rpartition("_rot")[0],
            "step_index": pending["step_index"],
            "error_type": reflection.error_type,
            "failed_action": pending["failed_action"],
            "failed_observation": pending["failed_observation"],
            "reflection": vars(reflection).copy(),
            "corrected_action": pending["corrected_action"],
            "final_answer": record.get("answer"),
        },
        provenance.KEY: block,
    }


def mine(records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Recovery]]:
    """Records with a grounded reflection, records that wait for a teacher, and every failure."""
    mined, pending, failures = [], [], []
    for record in records:
        for recovery in recoveries(record):
            failures.append(recovery)
            if recovery.repaired:
                waiting = pending_record(recovery)
                reflection = _ground(recovery)
                if reflection is None:
                    pending.append(waiting)
                else:
                    mined.append(complete(waiting, reflection))
    return mined, pending, failures


def mine_corpora(config: DataMineConfig) -> Report:
    """Writes ``mined.jsonl``, ``pending.jsonl`` and the report; says what each failure came to."""
    reading = read_files(config.source)
    records = [record for records in reading.records.values() for record in records]
    mined, pending, failures = mine(records)
    out = Path(config.out)
    write_records(out / "mined.jsonl", mined)
    write_records(out / "pending.jsonl", pending)
    counts = Counter((f.seen.kind, f.outcome) for f in failures)
    report = {
        "records": len(records),
        "failures": [
            {"id": f.record["id"], "turn": f.turn, "kind": f.seen.kind, "outcome": f.outcome}
            for f in failures
        ],
        "mined": len(mined),
        "pending": len(pending),
        "skipped": reading.skipped,
        "missing": reading.missing,
    }
    write_atomically(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    lines = [
        *reading.lines(),
        f"{out}: {len(failures)} failures in {len(records)} records, "
        f"{sum(f.repaired for f in failures)} repaired: {len(mined)} mined, {len(pending)} pending",
        *(f"  {count} {kind}: {outcome}" for (kind, outcome), count in sorted(counts.items())),
    ]
    return Report(lines, missing_files(reading))
