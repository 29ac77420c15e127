"""``regrpo report``: one HTML page about runs, with curves and the trajectories that were stored.

The page needs no network and no server: style and script are inside it, curves are SVG. What a
transcript says is text: everything from a run is escaped.
"""

import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrpo.records import write_atomically

# Those that answer "does it learn" first; others follow by name.
FIRST = (
    "reward/mean",
    "success",
    "success/first_try",
    "recovery",
    "reflection/rate",
    "reflection/tokens",
    "loss",
    "kl",
    "entropy",
    "grad_norm",
)
SHARES = ("success", "recovery", "reflection/rate", "reflection/unneeded", "groups/")  # 0 to 1
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
WINDOW = 10  # steps of the moving mean
POINTS = 500  # of a curve, at most; longer ones are shown by means
WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class LoggedRun:
    """What a run's folder holds: lines of its logs, and its configuration."""

    name: str
    metrics: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    config: dict[str, Any]

    def points(self, metric: str) -> Points:
        """(step, value) where the value is a number and finite."""
        return [
            (line["step"], line[metric])
            for line in self.metrics
            if isinstance(line.get(metric), int | float) and math.isfinite(line[metric])
        ]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; of a run that goes on, or was killed, a torn last one is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: {error}; expected JSON") from error
    return records


def load_runs(folders: Sequence[str]) -> list[LoggedRun]:
    """Reads runs; they are named by their folders, or by paths where those are alike.

    Raises:
        FileNotFoundError: a folder without any metrics.
    """
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(folders)
    runs = []
    for name, folder in zip(names, map(Path, folders), strict=True):
        metrics = read_log(folder / "metrics.jsonl")
        if not metrics:
            raise FileNotFoundError(f"{folder} holds no metrics.jsonl with metrics; expected a run")
        config = folder / "config.json"
        read = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        runs.append(LoggedRun(name, metrics, read_log(folder / "trajectories.jsonl"), read))
    return runs


def write_page(folders: Sequence[str], out: str | None = None) -> Path:
    """Writes the page; returns where. By default: report.html in what holds all of the runs."""
    runs = load_runs(folders)
    common = os.path.commonpath([Path(folder).resolve() for folder in folders])
    path = Path(out) if out else Path(common) / "report.html"
    write_atomically(path, page(runs))
    return path


def page(runs: Sequence[LoggedRun]) -> str:
    """The whole page."""
    metrics = metric_names(runs)
    curves = {m: [means(run.points(m), POINTS) for run in runs] for m in metrics}
    first, others = (
        "\n".join(chart(m, curves[m]) for m in metrics if (m in FIRST) == wanted)
        for wanted in (True, False)
    )
    # "<" would let a name end the script.
    data = json.dumps(curves, allow_nan=False).replace("<", "\\u003c")
    title = "regrpo: " + ", ".join(run.name for run in runs)
    here = Path(__file__)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{here.with_suffix(".css").read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>{text(title)}</h1>
{run_table(runs)}
<section id="curves" data-left="{LEFT}" data-right="{WIDTH - RIGHT}">
<h2>Curves</h2>
<p>Thin: every step. Bold: the mean of {WINDOW} points.</p>
<div class="charts">
{first}
</div>
<details><summary>other metrics</summary>
<div class="charts">
{others}
</div></details>
</section>
{trajectory_section(runs)}
<script type="application/json" id="data">{data}</script>
<script>
{here.with_suffix(".js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def text(value: object) -> str:
    """Any value as HTML text, or inside a quoted attribute."""
    return html.escape(str(value), quote=True)


# --- runs -----------------------------------------------------------------------------------------


def metric_names(runs: Sequence[LoggedRun]) -> list[str]:
    """Of what can be drawn, the ones to look at first in front."""
    names = {name for run in runs for line in run.metrics for name in line} - {"step"}
    drawn = [name for name in names if any(run.points(name) for run in runs)]
    order = {name: place for place, name in enumerate(FIRST)}
    return sorted(drawn, key=lambda name: (order.get(name, len(order)), name))


def run_table(runs: Sequence[LoggedRun]) -> str:
    """A row a run: a switch for its curves, how far it is, and its last values."""
    shown = [m for m in metric_names(runs) if m in FIRST[:7]]
    rows = []
    for index, run in enumerate(runs):
        last = [run.points(m)[-WINDOW:] for m in shown]
        values = [f"{mean(v for _, v in points):.3f}" if points else "" for points in last]
        rows.append(
            f'<tr><td><label style="--run:{COLOURS[index % len(COLOURS)]}">'
            f'<input type="checkbox" class="run" value="{index}" checked> {text(run.name)}</label>'
            f"</td><td>{run.metrics[-1]['step'] + 1} of {text(run.config.get('steps', '?'))}</td>"
            + "".join(f"<td>{value}</td>" for value in values)
            + "<td><details><summary>configuration</summary>"
            f"<pre>{text(json.dumps(run.config, indent=2))}</pre></details></td></tr>"
        )
    head = "".join(f"<th>{text(m)}</th>" for m in shown)
    return (
        f'<table class="runs"><caption>Means of the last {WINDOW} steps</caption><thead><tr>'
        f"<th>run</th><th>steps</th>{head}<th></th></tr></thead>"
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table>"
    )


# --- curves ---------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items)


def means(points: Points, count: int) -> Points:
    """At most ``count`` points: means of equal stretches."""
    size = -(-len(points) // count) or 1
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    return [(mean(x for x, _ in part), mean(y for _, y in part)) for part in stretches]


def smooth(points: Points) -> Points:
    """The mean of the last ``WINDOW`` points, at each."""
    windows = (points[max(0, i - WINDOW + 1) : i + 1] for i in range(len(points)))
    return [(window[-1][0], mean(y for _, y in window)) for window in windows]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between the two."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def value_range(metric: str, values: Sequence[float]) -> tuple[float, float]:
    if metric.startswith(SHARES) and min(values) >= 0 and max(values) <= 1:
        return 0.0, 1.0
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or abs(low) * 0.1 or 1.0
    return low - pad, high + pad


def chart(metric: str, curves: Sequence[Points]) -> str:
    """One metric of all runs."""
    x_low = min(x for points in curves for x, _ in points)
    x_high = max(max(x for points in curves for x, _ in points), x_low + 1)
    y_low, y_high = value_range(metric, [y for points in curves for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="y">{value:.4g}</text>')
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" class="x">{value:.6g}</text>')
    for index, points in enumerate(curves):
        lines = [
            " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in some)
            for some in (points, smooth(points))
        ]
        parts.append(
            f'<g class="curve" data-run="{index}" style="--run:{COLOURS[index % len(COLOURS)]}">'
            f'<polyline class="thin" points="{lines[0]}"/><polyline points="{lines[1]}"/></g>'
        )
    return (
        f'<figure data-metric="{text(metric)}" data-low="{x_low:g}" data-high="{x_high:g}">'
        f"<figcaption>{text(metric)}<output></output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(metric)} by step">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


# --- trajectories ---------------------------------------------------------------------------------


def trajectory_section(runs: Sequence[LoggedRun]) -> str:
    groups = [(index, group) for index, run in enumerate(runs) for group in run.groups]
    if not groups:
        return (
            '<section id="trajectories"><h2>Trajectories</h2><p>These runs stored none '
            "(regrpo train does, every log_trajectories_every updates).</p></section>"
        )
    steps = sorted({group["step"] for _, group in groups})
    options = "".join(f"<option>{step}</option>" for step in steps)
    largest = max(abs(member["advantage"]) for _, g in groups for member in g["trajectories"])
    shown = "\n".join(group_article(index, runs[index].name, g, largest) for index, g in groups)
    kinds = "".join(
        f'<span class="segment {kind}">{kind}</span> '
        for kind in ("context", "action", "observation", "reflection")
    )
    return f"""<section id="trajectories">
<h2>Trajectories</h2>
<form>
<label>update <select id="step"><option value="">all</option>{options}</select></label>
<label>outcome <select id="outcome"><option value="">all</option><option>success</option>\
<option>failure</option></select></label>
<label>colour by <select id="colour"><option>segment</option><option>advantage</option></select>\
</label>
<span class="key by-segment">{kinds}</span>
<span class="key by-advantage"><span class="good" style="--share:1">above the group</span> \
<span class="bad" style="--share:1">below it</span>, trained tokens only</span>
</form>
{shown}
</section>"""


def group_article(index: int, run: str, group: dict[str, Any], largest: float) -> str:
    task = group["task"]
    forced = f", behind a forced {text(group['error_type'])}" if group["error_type"] else ""
    members = "\n".join(member_details(member, largest) for member in group["trajectories"])
    return (
        f'<article data-run="{index}" data-step="{group["step"]}">'
        f"<h3>{text(task['question'])}</h3>"
        f"<p>{text(run)}, update {group['step']}, {text(task['family'])}{forced}; "
        f"expected {text(task['expected'])}</p>"
        f'<details><summary>context</summary><pre class="segment context">'
        f"{text(group['context'])}</pre></details>\n{members}\n</article>"
    )


def member_details(member: dict[str, Any], largest: float) -> str:
    advantage = member["advantage"]
    outcome = "success" if member["success"] else "failure"
    side = "good" if advantage > 0 else "bad"
    share = math.sqrt(abs(advantage) / largest) if largest else 0.0  # small ones show as well
    segments = "".join(
        f'<span class="segment {text(part["segment"])}" '
        f'title="{text(part["segment"])}, {part["tokens"]} tokens">{text(part["text"])}</span>'
        for part in member["segments"]
    )
    return (
        f'<details class="member {side}" data-outcome="{outcome}" style="--share:{share:.3f}">'
        f'<summary><b class="{outcome}">{outcome}</b> reward {member["reward"]:.3f}, '
        f'advantage <span class="advantage">{advantage:+.3f}</span></summary>'
        f"<pre>{segments}</pre></details>"
    )
