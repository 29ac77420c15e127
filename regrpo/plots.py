"""The demo's pictures: learning curves, and the comparison with its intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from regrpo.evaluate import Rate, Report

COLUMNS: dict[str, str] = {
    "success": "success %",
    "success_serial": "serial tasks %",
    "first_try": "first try %",
    "recovery_own": "recovery, own %",
    "recovery_forced": "recovery, forced %",
    "unneeded": "unneeded refl. %",
    "reflection_tokens": "refl. tokens",
}
WINDOW = 10


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a metrics.jsonl."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the last ``WINDOW`` values."""
    windows = (values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _draw(axes: Axes, runs: Mapping[str, Path], metric: str, title: str, xlabel: str) -> None:
    for name, folder in runs.items():
        columns = read_metrics(folder / "metrics.jsonl")
        if columns:
            (line,) = axes.plot(columns["step"], _smooth(columns[metric]), label=name)
            axes.plot(columns["step"], columns[metric], alpha=0.2, color=line.get_color())
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def plot_curves(sft: Mapping[str, Path], rl: Mapping[str, Path], path: Path) -> None:
    """Loss of the supervised runs; success, recovery and reflection length of the RL runs."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _draw(axes[0, 0], sft, "loss", "supervised loss (nats a token)", "step")
    axes[0, 0].set_yscale("log")
    _draw(axes[0, 1], rl, "success", "success of sampled trajectories", "update")
    _draw(axes[1, 0], rl, "recovery", "recovery after a failed call", "update")
    _draw(axes[1, 1], rl, "reflection/tokens", "reflection tokens a correction", "update")
    for panel in (axes[0, 1], axes[1, 0]):
        panel.set_ylim(0, 1)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def cell(report: Report, column: str) -> str:
    """A table cell: percent with the half-width of its interval, or a number."""
    value = getattr(report, column)
    if not isinstance(value, Rate):
        return f"{value:.1f}"
    if not value.count:
        return "-"
    low, high = value.interval
    return f"{value.percent:.1f} [{low:.0f}-{high:.0f}]"


def plot_table(reports: Mapping[str, Report], path: Path, note: str) -> None:
    """The comparison as bars with 95 % intervals above, as numbers below."""
    figure, (bars, table) = plt.subplots(
        2, 1, figsize=(12, 6.4), height_ratios=(3, 2), layout="constrained"
    )
    shown = ("success", "recovery_own", "recovery_forced", "unneeded")
    width = 0.8 / len(shown)
    for index, column in enumerate(shown):
        rates: list[Rate] = [getattr(r, column) for r in reports.values()]
        heights = [r.percent if r.count else 0.0 for r in rates]
        errors = [
            (r.percent - r.interval[0], r.interval[1] - r.percent) if r.count else (0.0, 0.0)
            for r in rates
        ]
        positions = [i + (index - (len(shown) - 1) / 2) * width for i in range(len(rates))]
        bars.bar(
            positions,
            heights,
            width,
            yerr=list(zip(*errors, strict=True)),
            capsize=2,
            label=COLUMNS[column],
        )
    bars.set_xticks(range(len(reports)), list(reports))
    bars.set_ylim(0, 118)  # room for the legend
    bars.grid(axis="y", alpha=0.3)
    bars.legend(frameon=False, ncols=len(shown), loc="upper left")
    table.axis("off")
    drawn = table.table(
        [[cell(r, c) for c in COLUMNS] for r in reports.values()],
        rowLabels=list(reports),
        colLabels=list(COLUMNS.values()),
        loc="center",
        cellLoc="center",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1, 1.5)
    table.set_title(note, fontsize=9, y=-0.05)
    figure.savefig(path, dpi=130)
    plt.close(figure)
