"""Tables and figures of an experiment: means over seeds with 95 % intervals."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from regrpo.plots import read_metrics
from regrpo.recipe import AGENTS
from regrpo.records import write_atomically
from regrpo.tasks import FAMILIES, SERIAL_FAMILIES

# Student's t, the 97.5 % point, by degrees of freedom; beyond the table the normal one is near.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
MARK = "<!-- experiment -->", "<!-- /experiment -->"
WINDOW = 5
Report = Mapping[str, Any]  # a report.json


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % interval (Student 1908)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        if not values or any(math.isnan(v) for v in values):
            return cls(math.nan, math.nan)
        count = len(values)
        t = T_975[count - 2] if count - 2 < len(T_975) else 1.96
        half = t * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
        return cls(statistics.fmean(values), half)

    def __str__(self) -> str:
        return "-" if math.isnan(self.mean) else f"{self.mean:.1f} ± {self.half:.1f}"


@dataclass(frozen=True)
class Results:
    """Reports and metrics files of every agent, a seed each, the seeds in the same order."""

    reports: Mapping[str, Sequence[Report]]
    metrics: Mapping[str, Sequence[Path]]

    def interval(self, agent: str, value: Callable[[Report], float]) -> Interval:
        return Interval.of([value(report) for report in self.reports[agent]])

    def difference(self, agent: str, other: str, value: Callable[[Report], float]) -> Interval:
        """Of the same value between two agents of the same seed."""
        pairs = zip(self.reports[agent], self.reports[other], strict=True)
        return Interval.of([value(a) - value(b) for a, b in pairs])


def percent(name: str) -> Callable[[Report], float]:
    """A rate of the report in percent; NaN where there was nothing to count."""
    return lambda report: report[name]["percent"] if report[name] else math.nan


def family(name: str, column: str) -> Callable[[Report], float]:
    """A rate of one task family."""
    return lambda report: percent(column)(report["families"][name])


def serial_recovery(report: Report) -> float:
    """Recovery from own failures, over the serial families together."""
    found = [report["families"][name]["recovery_own"] for name in SERIAL_FAMILIES]
    rates = [rate for rate in found if rate]
    count = sum(rate["count"] for rate in rates)
    return sum(rate["percent"] * rate["count"] for rate in rates) / count if count else math.nan


def reflection_tokens(report: Report) -> float:
    return float(report["reflection_tokens"])


COLUMNS: dict[str, Callable[[Report], float]] = {
    "success %": percent("success"),
    "serial tasks %": percent("success_serial"),
    "first try %": percent("first_try"),
    "recovery, own %": percent("recovery_own"),
    "recovery, own, serial %": serial_recovery,
    "recovery, forced %": percent("recovery_forced"),
    "unneeded refl. %": percent("unneeded"),
    "refl. tokens": reflection_tokens,
}
COMPARED = ("success %", "serial tasks %", "recovery, own %", "refl. tokens")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def agents_table(results: Results) -> str:
    """Every agent, every measure."""
    rows = [
        [AGENTS[a].title, *(str(results.interval(a, value)) for value in COLUMNS.values())]
        for a in results.reports
    ]
    return _table(["agent", *COLUMNS], rows)


def differences_table(results: Results, agent: str = "regrpo") -> str:
    """One agent against each other, seed by seed."""
    rows = [
        [AGENTS[a].title, *(str(results.difference(agent, a, COLUMNS[c])) for c in COMPARED)]
        for a in results.reports
        if a != agent
    ]
    return _table([f"{AGENTS[agent].title} minus", *COMPARED], rows)


def families_table(results: Results, column: str) -> str:
    """A rate by task family."""
    rows = [
        [AGENTS[a].title, *(str(results.interval(a, family(f, column))) for f in FAMILIES)]
        for a in results.reports
    ]
    return _table(["agent", *FAMILIES], rows)


def hops_of(results: Results) -> list[str]:
    """The lengths of repairs that were met in every evaluation."""
    met = [set(report["hops"]) for reports in results.reports.values() for report in reports]
    return sorted(set.intersection(*met), key=int)


def at_hops(hops: str) -> Callable[[Report], float]:
    """Success on the serial tasks whose repair takes that many hops."""
    return lambda report: float(report["hops"][hops]["percent"])


def hops_table(results: Results) -> str:
    """Success on serial tasks by the hops that the repair takes."""
    hops = hops_of(results)
    rows = [
        [
            AGENTS[a].title,
            *(str(results.interval(a, at_hops(h))) for h in hops),
        ]
        for a in results.reports
    ]
    return _table(["agent", *hops], rows)


def budget_table(results: Results) -> str:
    """What each agent was trained on, behind the base model: means over seeds."""
    rows = []
    for agent, files in results.metrics.items():
        runs = [read_metrics(path) for path in files]
        start = AGENTS[agent].start
        sampled = [sum(m.get("trajectories", [])) for m in runs]
        rows.append(
            [
                AGENTS[agent].title,
                "-" if start is None else AGENTS[start].title,
                f"{statistics.fmean(len(m['step']) for m in runs):.0f}",
                f"{statistics.fmean(sampled):,.0f}",
                f"{statistics.fmean(sum(m['tokens']) for m in runs) / 1e6:.2f}",
                f"{statistics.fmean(sum(m['trained_tokens']) for m in runs) / 1e6:.2f}",
            ]
        )
    header = ["agent", "starts from", "updates", "trajectories", "M tokens", "M tokens trained"]
    return _table(header, rows)


def figures(results: Results, folder: Path) -> list[Path]:
    """Draws the comparison, success by hops, and the learning curves; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (("agents", _agents), ("hops", _hops), ("curves", _curves)):
        path = folder / f"experiment-{name}.svg"
        figure = draw(results)
        # No date and no random ids: the same results draw the same file.
        with plt.rc_context({"svg.hashsalt": name}):
            figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        drawn.append(path)
    return drawn


def _agents(results: Results) -> plt.Figure:
    shown = ("success %", "serial tasks %", "recovery, own %")
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 4), layout="constrained", sharey=True)
    titles = [AGENTS[a].title for a in results.reports]
    for panel, column in zip(axes, shown, strict=True):
        found = [results.interval(a, COLUMNS[column]) for a in results.reports]
        panel.barh(titles, [i.mean for i in found], xerr=[i.half for i in found], capsize=3)
        panel.set_title(column)
        panel.set_xlim(0, 100)
        panel.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    return figure


def _hops(results: Results) -> plt.Figure:
    figure, panel = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    hops = hops_of(results)
    for index, agent in enumerate(results.reports):
        found = [results.interval(agent, at_hops(h)) for h in hops]
        panel.errorbar(
            [int(h) + 0.04 * index for h in hops],
            [i.mean for i in found],
            [i.half for i in found],
            capsize=2,
            elinewidth=0.6,
            label=AGENTS[agent].title,
        )
    panel.set_xlabel("hops of the repair (0: none needed)")
    panel.set_ylabel("success on serial tasks %")
    panel.set_ylim(0, 105)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _curves(results: Results) -> plt.Figure:
    shown = {"success": "success of trajectories", "reflection/tokens": "reflection tokens"}
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 4.2), layout="constrained")
    for panel, (metric, title) in zip(axes, shown.items(), strict=True):
        for index, (agent, files) in enumerate(results.metrics.items()):
            told = AGENTS[agent]
            sampled = told.start is not None and told.train.get("mode") != "offline"
            if not sampled or (metric != "success" and not told.reflect):
                continue
            columns = [read_metrics(path)[metric] for path in files]
            means = [statistics.fmean(values) for values in zip(*columns, strict=True)]
            smooth = [
                statistics.fmean(means[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(means))
            ]
            panel.plot(smooth, color=f"C{index}", label=told.title)
        panel.set_title(f"{title}, mean over seeds")
        panel.set_xlabel("update")
        panel.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def page_section(results: Results, drawn: Sequence[Path]) -> str:
    """The tables and figures as Markdown."""
    count = len(next(iter(results.reports.values())))
    links = "\n".join(f"![{path.stem}]({path.as_posix()})" for path in drawn)
    parts = (
        (f"Means over {count} seeds ± 95 % intervals", agents_table(results)),
        ("Differences within a seed", differences_table(results)),
        ("Success % by task family", families_table(results, "success")),
        ("Recovery from own failures % by task family", families_table(results, "recovery_own")),
        ("Success % on serial tasks by hops of the repair", hops_table(results)),
        ("Training behind the base model, means over seeds", budget_table(results)),
    )
    return "\n\n".join([links, *(f"### {title}\n\n{table}" for title, table in parts)])


def write_section(page: Path, section: str) -> None:
    """Puts the section between the marks of a page; a page that is not there is made.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARK)
    pattern = re.compile(f"{re.escape(MARK[0])}.*{re.escape(MARK[1])}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no section {MARK[0]} ... {MARK[1]}; add the two lines")
    marked = f"{MARK[0]}\n{section}\n{MARK[1]}"
    write_atomically(page, pattern.sub(lambda _: marked, text).rstrip() + "\n")
