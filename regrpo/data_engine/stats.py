"""What a corpus holds: kinds, origins, error types, tools, lengths."""

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

from regrpo import provenance
from regrpo.config import DataStatsConfig
from regrpo.data_engine.exchange import Report, missing_files, read_files
from regrpo.data_engine.near_miss import ERROR_SHARES
from regrpo.data_engine.recorded import answered, code_of, made_names, observation, tool_calls
from regrpo.records import Record
from regrpo.tool_calls import reflection_span

Measure = Callable[[str], int]


def tools_of(record: Record) -> list[str]:
    """Names of the tools that a record's turns call, in order."""
    names: list[str] = []
    defined: frozenset[str] = frozenset()
    for message in record["conversations"]:
        code = code_of(message["content"]) if message["role"] == "assistant" else None
        if code is not None:
            names += [call.name for call in tool_calls(code, defined)]
            defined |= made_names(code)
    return names


def kind(record: Record) -> str:
    """``rot``, ``pending`` (mined, without a reflection yet) or ``clean``."""
    if record.get("rot_meta") is not None:
        return "rot"
    return "pending" if "pending" in record.get(provenance.KEY, {}) else "clean"


def _reflections(record: Record) -> list[str]:
    spans = [
        (m["content"], reflection_span(m["content"]))
        for m in record["conversations"]
        if m["role"] == "assistant"
    ]
    return [content[slice(*span)] for content, span in spans if span]


def _spread(name: str, values: Sequence[int]) -> str:
    if not values:
        return f"{name}: none"
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return f"{name}: median {median(ordered):g}, 95 % {high}, most {ordered[-1]}"


def _counts(name: str, counts: Counter[str]) -> list[str]:
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{name}:", *(f"  {count} {value}" for value, count in rows)] if rows else []


def describe(records: Sequence[Record], measures: dict[str, Measure]) -> list[str]:
    """The lines of the table.

    Args:
        measures: how long a text is, by unit.
    """
    rot = [r for r in records if kind(r) == "rot"]
    types = Counter(str(r["rot_meta"]["error_type"]) for r in rot)
    origins = Counter(provenance.provenance(r) or "unknown" for r in records)
    failures = Counter(provenance.failure_provenance(r) or "unknown" for r in rot)
    written = Counter(r.get(provenance.KEY, {}).get("reflection", "grounded") for r in rot)
    ids = Counter(str(r["id"]) for r in records)
    seen = [observation(after).text for r in records for *_, after in answered(r["conversations"])]
    lines = [f"{len(records)} records, {len(ids)} ids"]
    lines += _counts("kinds", Counter(map(kind, records)))
    lines += _counts("provenance", origins)
    lines += _counts("provenance of the failures", failures)
    lines += _counts("reflections by", written)
    if rot:
        lines.append("error types (share, target):")
        for name in [*ERROR_SHARES, *sorted(set(types) - set(ERROR_SHARES))]:
            target = ERROR_SHARES.get(name)
            aim = "none" if target is None else f"{target:.3f}"
            lines.append(f"  {types[name]} {name}: {types[name] / len(rot):.3f}, {aim}")
    lines += _counts("tools", Counter(name for r in records for name in tools_of(r)))
    lines.append(f"observations: {len(seen)}, {len(set(seen))} unique")
    lines.append(_spread("turns", [len(r["conversations"]) for r in records]))
    for unit, measure in measures.items():
        lengths = [sum(measure(m["content"]) for m in r["conversations"]) for r in records]
        lines.append(_spread(f"{unit} a record", lengths))
        told = [measure(text) for r in records for text in _reflections(r)]
        lines.append(_spread(f"{unit} a reflection", told))
    return lines


def corpus_stats(config: DataStatsConfig) -> Report:
    """The table over all files together, below a line for everything that was not read."""
    measures: dict[str, Measure] = {"characters": len}
    if config.tokenizer is not None:
        from regrpo.modeling import load_tokenizer  # takes torch, seconds to import

        tokenizer = load_tokenizer(config.tokenizer)
        measures["tokens"] = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
    reading = read_files(config.files)
    records = [record for found in reading.records.values() for record in found]
    return Report([*reading.lines(), *describe(records, measures)], missing_files(reading))
