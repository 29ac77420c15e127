"""What people read of a benchmark run: tables and transcripts, in Markdown."""

from collections.abc import Iterable, Sequence

from regrpo.benchmarks.episodes import Entry


def table(columns: Sequence[str], rows: Iterable[tuple[str, dict[str, float | None]]]) -> str:
    """Percentages, ``-`` where nothing counts."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in rows:
        cells = (scores.get(column) for column in columns)
        shown = ("-" if value is None else f"{value:.2f}" for value in cells)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def listing(title: str, lines: Sequence[str], most: int = 50) -> str:
    """A counted list; nothing for an empty one."""
    if not lines:
        return ""
    more = [f"- … and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(
        [f"\n## {title}: {len(lines)}\n", *(f"- {x}" for x in lines[:most]), *more, ""]
    )


def episode_text(title: str, entry: Entry | None) -> str:
    """One episode, or one continued prefix."""
    if entry is None:
        return f"## {title}\n\nnot run\n"
    parts = [f"## {title}\n"]
    for number, turn in enumerate(entry["turns"]):
        parts.append(f"### Turn {number}\n\n{_fenced(turn['text'])}\n")
        if "observation" in turn:
            parts.append(f"Observation ({turn['status']}):\n\n{_fenced(turn['observation'])}\n")
    parts.append(f"It ended because {entry['end']}. Answer: {entry['answer']}\n")
    return "\n".join(parts)


def _fenced(text: str) -> str:
    fence = "````"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
