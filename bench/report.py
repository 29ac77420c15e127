"""Turns a run of the benchmarks into the tables and plots of the documentation.

    pytest bench/ --benchmark-json=run.json
    python -m bench.report run.json                              prints, and draws into docs/figures
    python -m bench.report run.json --into docs/performance.md   replaces that page's section

A page's section for a device lies between `<!-- bench:cpu -->` and `<!-- /bench:cpu -->` (or cuda).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import figures, tables

ROOT = Path(__file__).resolve().parent.parent
MADE_BY = "pytest bench/ --benchmark-json=run.json"


class ReportError(Exception):
    """What is wrong with the input, for whoever typed the command."""


def load(path: Path) -> dict[str, Any]:
    """The part of a pytest-benchmark JSON that our session wrote."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; `{MADE_BY}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON ({error}); `{MADE_BY}` writes one") from error
    run = content.get("regrpo") if isinstance(content, dict) else None
    if not isinstance(run, dict):
        raise ReportError(
            f'{path} has no "regrpo" entry: it is not from our benchmarks; `{MADE_BY}` writes one'
        )
    if run.get("format") != tables.FORMAT:
        raise ReportError(
            f"{path} has format {run.get('format')!r}, this version reads {tables.FORMAT}; "
            f"run `{MADE_BY}` again"
        )
    if not run["records"]:
        raise ReportError(f"{path} holds no measurement: all of its tests were skipped or failed")
    return run


def section(run: dict[str, Any], drawn: list[Path], page: Path) -> str:
    """Markdown: the figures, linked as seen from `page`, then the tables."""
    titles = {
        "speedup": "Time over ours",
        "bandwidth": "Share of the floor",
        "memory": "Peak memory",
    }
    links = []
    for path in drawn:
        title = titles[path.stem.rsplit("-", 1)[1]]
        links.append(f"![{title}]({path.resolve().relative_to(page.resolve().parent).as_posix()})")
    return "\n\n".join(filter(None, ["\n".join(links), tables.render(run)]))


def replace(page: Path, device: str, text: str) -> None:
    begin, end = f"<!-- bench:{device} -->", f"<!-- /bench:{device} -->"
    try:
        content = page.read_text()
    except FileNotFoundError:
        raise ReportError(f"{page} does not exist") from None
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ReportError(f"{page} has no section between {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", type=Path, help=f"the JSON that `{MADE_BY}` wrote")
    parser.add_argument("--into", type=Path, help="the Markdown page whose section is replaced")
    parser.add_argument("--figures", type=Path, help="default: figures/ beside the page")
    options = parser.parse_args(arguments)
    page = options.into or ROOT / "docs" / "performance.md"
    folder = options.figures or page.parent / "figures"
    try:
        run = load(options.run)
        device = run["machine"]["device"]
        folder.mkdir(parents=True, exist_ok=True)
        drawn = figures.draw(run["records"], folder, device)
        if options.into:
            replace(page, device, section(run, drawn, page))
        else:
            print(tables.render(run))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("wrote " + ", ".join(map(str, drawn)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
