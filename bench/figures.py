"""The three plots of a run: speed-up, bandwidth against copy, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from bench.tables import Record, cases, floor_seconds, seconds_of

COLORS = {
    "ours": "#1b6ca8",
    "eager": "#8d99ae",
    "torch.compile": "#e09f3e",
    "peer": "#9e2a2b",
    "floor": "#333333",
}
PEERS = ("#9e2a2b", "#5f8d4e", "#7b5ea7", "#c2703d")
MOST_CASES = 32  # in one figure; a grid has hundreds, and its tables hold the rest


def draw(records: list[Record], folder: Path, name: str) -> list[Path]:
    """Writes `<name>-speedup.svg`, `-bandwidth.svg` and `-memory.svg`, those that have data."""
    plt.rcParams.update({"font.size": 8, "svg.hashsalt": "regrpo", "svg.fonttype": "path"})
    shown = headline(cases(records))
    colors = _colors(shown)
    written = []
    for kind, plot in (("speedup", _speedup), ("bandwidth", _bandwidth), ("memory", _memory)):
        figure = plot(shown, colors)
        if figure is None:
            continue
        path = folder / f"{name}-{kind}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        written.append(path)
    return written


def headline(found: list[list[Record]]) -> list[list[Record]]:
    """The largest cases of each op, with all tokens trained before others."""
    by_op: dict[str, list[list[Record]]] = {}
    for case in found:
        by_op.setdefault(case[0]["op"], []).append(case)
    each = max(MOST_CASES // max(len(by_op), 1), 2)
    kept = []
    for group in by_op.values():
        largest = sorted(group, key=lambda c: (c[0]["share"] < 1, -c[0]["logits_bytes"]))[:each]
        kept += [case for case in group if case in largest]
    return kept


def label(case: list[Record]) -> str:
    r = case[0]
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[r["dtype"]]
    parts = [r["op"], f"{r['shape']} {dtype}", r["variant"]]
    return "\n".join(part for part in parts if part)


def _valid(case: list[Record], kinds: tuple[str, ...]) -> list[Record]:
    return [r for r in case if r["kind"] in kinds and r["status"] == "ok"]


def _colors(shown: list[list[Record]]) -> dict[str, str]:
    """One color a provider, the same in all figures."""
    colors: dict[str, str] = {}
    for record in (r for case in shown for r in case):
        name, kind = record["provider"], record["kind"]
        if name in colors:
            continue
        if kind == "peer":
            peers = sum(c in PEERS for c in colors.values())
            colors[name] = PEERS[peers % len(PEERS)]
        elif kind == "ours":  # shades: implementations and modes
            shades = ("#1b6ca8", "#7fb2d9", "#0b3c5d", "#b5d3ea")
            colors[name] = shades[sum(c in shades for c in colors.values()) % len(shades)]
        else:
            colors[name] = COLORS[kind]
    return colors


def _bars(
    shown: list[list[Record]],
    colors: dict[str, str],
    kinds: tuple[str, ...],
    value: Callable[[list[Record], Record], float | None],
    text: str,
    form: str,
    log: bool = False,
    start: float = 0.0,
) -> plt.Figure | None:
    """Horizontal bars, a group for each case and a bar for each provider."""
    ticks, names, used, y = [], [], set(), 0.0
    figure, axes = plt.subplots()
    for case in shown:
        bars = [(r, v) for r in _valid(case, kinds) if (v := value(case, r)) is not None]
        if not bars:
            continue
        lines = label(case)
        room = max(len(bars), 1 + lines.count("\n"))  # of the bars, or of their label
        ticks.append(y + (room - 1) / 2)
        names.append(lines)
        y += (room - len(bars)) / 2
        for record, length in bars:
            used.add(record["provider"])
            color = colors[record["provider"]]
            axes.barh(y, length - start, left=start, color=color, height=0.9)
            axes.annotate(
                form.format(length),
                (max(length, start), y),
                (2, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
            y += 1
        y += 1 + (room - len(bars)) / 2
    if not ticks:
        plt.close(figure)
        return None
    figure.set_size_inches(6.4, max(0.16 * y, 1.2) + 0.9)
    axes.set_yticks(ticks, names)
    axes.set_ylim(y - 1, -1)
    axes.set_xlabel(text)
    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for n, c in colors.items() if n in used]
    axes.legend(
        handles,
        [n for n in colors if n in used],
        frameon=False,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    return figure


def _speedup(shown: list[list[Record]], colors: dict[str, str]) -> plt.Figure | None:
    """How many times as long each other provider takes as the fastest of ours."""
    shown = [case for case in shown if not case[0]["once"]]

    def value(case: list[Record], record: Record) -> float | None:
        best = seconds_of(case, "ours")
        return record["seconds"] / best if best else None

    figure = _bars(
        shown,
        colors,
        ("eager", "torch.compile", "peer"),
        value,
        "time over that of ours (log scale; more than 1: ours is faster)",
        "{:.1f}",
        log=True,
        start=1.0,
    )
    if figure is not None:
        figure.axes[0].axvline(1, color=COLORS["ours"], linewidth=1)
    return figure


def _bandwidth(shown: list[list[Record]], colors: dict[str, str]) -> plt.Figure | None:
    """Share of the speed of copy (row ops) or of the matmuls alone (linear ops)."""
    shown = [case for case in shown if not case[0]["once"]]

    def value(case: list[Record], record: Record) -> float | None:
        floor = floor_seconds(case, record)
        return 100 * floor / record["seconds"] if floor else None

    figure = _bars(
        shown,
        colors,
        ("ours", "torch.compile", "peer"),
        value,
        "% of the speed of copy (row ops) or of the matmuls alone (linear ops), in the same run",
        "{:.0f}",
    )
    if figure is not None:
        figure.axes[0].axvline(100, color=COLORS["floor"], linewidth=1)
    return figure


def _memory(shown: list[list[Record]], colors: dict[str, str]) -> plt.Figure | None:
    """Peak memory of one call beyond its inputs."""
    gradient = [case for case in shown if "grpo_loss" in case[0]["op"]]
    return _bars(
        gradient,
        colors,
        ("ours", "eager", "torch.compile", "peer"),
        lambda case, record: max(record["extra"] / 1e6, 1.0),
        "peak memory of forward + backward beyond the inputs, MB (log scale; 1: 1 or less)",
        "{:.0f}",
        log=True,
        start=0.5,
    )
