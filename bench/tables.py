"""A run as Markdown: what `pytest bench/` prints and `python -m bench.report` writes."""

from __future__ import annotations

from typing import Any

FORMAT = 1  # of the JSON under "regrpo"; `Session.as_json` writes it
QUIET = 0.5  # load average, and cores used by others, above which a run is not to be trusted
# ops of which ours is compared with each of the others, and what their shapes are
GROUP = "context x K x vocabulary"
WHOLE = {
    "update": GROUP,
    "generation": GROUP,
    "trl step": GROUP,
    "LigerFusedLinearGRPOLoss": "K x length x vocabulary",
    "triton_grpo_loss": "K x length x vocabulary",
    "fused_selective_log_softmax": "K x length x vocabulary",
}
NOISY = 0.25  # cores used by others during one case

Record = dict[str, Any]
LEGEND = """\
- ms, median: best and median of the rounds. GB/s counts one read of the trained rows, and for
  `grpo_loss` one write of all rows; TFLOP/s the matmuls of the trained rows.
- of floor: the time of `copy_` for the same bytes, or of the matmuls alone, over this time.
- extra: memory at the worst moment of a call beyond what was there before, in MB and in % of the
  whole logits.
- x eager, x compile: their best time over this one. In bold: ours.
"""


def case_key(record: Record) -> tuple[str, ...]:
    return tuple(record[k] for k in ("op", "shape", "dtype", "variant"))


def cases(records: list[Record]) -> list[list[Record]]:
    """The records of each case, in the order in which they were measured."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(case_key(record), []).append(record)
    return list(found.values())


def seconds_of(case: list[Record], kind: str) -> float | None:
    """The best valid time of a kind, None where there is none."""
    times = [r["seconds"] for r in case if r["kind"] == kind and r["status"] == "ok"]
    return min(times, default=None)


def floor_seconds(case: list[Record], record: Record) -> float | None:
    """How long the record's bytes take at the speed of `copy_`, or its matmuls on their own."""
    floor = next((r for r in case if r["kind"] == "floor" and r["status"] == "ok"), None)
    if floor is None or record["kind"] == "floor":
        return None
    work = "traffic" if floor["traffic"] else "flops"
    return floor["seconds"] * record[work] / floor[work] if record[work] else None


def render(run: dict[str, Any]) -> str:
    parts = [heading(run), *warnings(run), LEGEND]
    ops: dict[str, list[Record]] = {}
    for record in run["records"]:
        ops.setdefault(record["op"], []).append(record)
    for op, records in ops.items():
        text = whole_table(records) if op in WHOLE else table(records)
        parts.append(f"### {op}\n\n{text}")
    if run["left_out"]:
        lines = [f"- {case}: {why}" for case, why in run["left_out"].items()]
        parts.append("Left out:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def heading(run: dict[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    build = machine["build"]
    compiled = build["cuda_architectures"] if machine["device"] == "cuda" else build["cpu_isa"]
    return (
        f"{machine['device_name']}, {machine['threads']} threads, Python {machine['python']}, "
        f"{versions}; kernels for {compiled}. Load average {run['load_at_start']:.2f} at the start "
        f"and {run['load_at_end']:.2f} at the end; other processes used "
        f"{run['foreign_cores']:.2f} cores on average.\n"
    )


def warnings(run: dict[str, Any]) -> list[str]:
    if run["load_at_start"] <= QUIET and run["foreign_cores"] <= QUIET:
        return []
    return [
        f"**Warning: the machine was not quiet** (above {QUIET}): ratios and times may be off. "
        "Rows with * saw other processes use more than "
        f"{NOISY} cores.\n"
    ]


def table(records: list[Record]) -> str:
    linear = any(r["flops"] for r in records)
    rate = "TFLOP/s" if linear else "GB/s"
    head = ["shape", "dtype", "case", "provider", "ms", "median", rate, "of floor", "extra MB"]
    head += ["% of logits", "x eager", "x compile", "note"]
    rows = [head]
    for case in cases(records):
        first = True
        for r in case:
            label = [r["shape"], r["dtype"], r["variant"]] if first else ["", "", ""]
            rows.append([*label, *_cells(case, r)])
            first = False
    return markdown(rows, left={0, 1, 2, 3, len(head) - 1})


def markdown(rows: list[list[str]], left: set[int]) -> str:
    """A table whose first row is its head; columns ``left`` are aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]

    def line(row: list[str]) -> str:
        cells = [
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])]) + "\n"


def whole_table(records: list[Record]) -> str:
    """Whole updates, rollouts or calls of a peer. Tokens are those of all trajectories, of a
    rollout the sampled ones; "x ours": time and extra memory over those of ours.
    """
    head = [
        WHOLE[records[0]["op"]],
        "dtype",
        "provider",
        "s",
        "tokens/s",
        "x ours",
        "extra MB",
        "x ours",
        "note",
    ]
    rows = [head]
    for case in cases(records):
        ours = case[0]
        for i, r in enumerate(case):
            label = [r["shape"], r["dtype"]] if i == 0 else ["", ""]
            numbers = [""] * 5
            if r["seconds"] is not None:
                numbers = [
                    f"{r['seconds']:.3g}",
                    f"{r['tokens'] / r['seconds']:.0f}",
                    f"{r['seconds'] / ours['seconds']:.1f}",
                    f"{r['extra'] / 1e6:.0f}",
                    f"{r['extra'] / ours['extra']:.1f}" if ours["extra"] else "",
                ]
            noisy = "*" if r["foreign_cores"] > NOISY else ""
            rows.append([*label, r["provider"] + noisy, *numbers, _note(r)])
    return markdown(rows, left={0, 1, 2, len(head) - 1})


def _cells(case: list[Record], r: Record) -> list[str]:
    noisy = "*" if r["foreign_cores"] > NOISY else ""
    if r["seconds"] is None:
        return [r["provider"], *[""] * 8, _note(r)]
    floor = floor_seconds(case, r)
    rate = r["flops"] / 1e12 if r["flops"] else r["traffic"] / 1e9
    bold = "**" if r["kind"] == "ours" else ""

    def against(kind: str) -> str:
        other = seconds_of(case, kind)
        if other is None or r["kind"] in (kind, "floor"):
            return ""
        return f"{bold}{other / r['seconds']:.1f}{bold}"

    return [
        r["provider"] + noisy,
        f"{1e3 * r['seconds']:.3g}" if r["seconds"] < 0.1 else f"{1e3 * r['seconds']:.0f}",
        f"{1e3 * r['median']:.3g}" if r["median"] < 0.1 else f"{1e3 * r['median']:.0f}",
        f"{rate / r['seconds']:.3g}",
        f"{floor / r['seconds']:.2f}" if floor else "",
        f"{r['extra'] / 1e6:.0f}" if r["kind"] != "floor" else "",
        f"{100 * r['extra'] / r['logits_bytes']:.1f}" if r["kind"] != "floor" else "",
        against("eager"),
        against("torch.compile"),
        _note(r),
    ]


def _note(r: Record) -> str:
    parts = [r["status"] if r["status"] != "ok" else "", r["note"].replace("|", "/")]
    return ": ".join(filter(None, parts))
