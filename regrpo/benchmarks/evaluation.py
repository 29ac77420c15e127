"""`regrpo eval --benchmark`: runs what is left to run, and writes what came out.

In the folder of the run: ``episodes.jsonl`` (a journal; a killed run goes on from it),
``report.json``, ``report.md``, ``transcripts/`` with a page a task, ``images/`` that tools made.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from regrpo.benchmarks.episodes import ChatModel, Entry, Episode, run_episodes
from regrpo.benchmarks.gaia_report import gaia_run
from regrpo.benchmarks.gta_report import gta_run
from regrpo.benchmarks.models import EndpointChat, PolicyChat
from regrpo.config import EvalConfig
from regrpo.endpoint import read_key
from regrpo.errors import RunError
from regrpo.journal import Journal
from regrpo.records import write_atomically

JOURNAL, REPORT, PAGE = "episodes.jsonl", "report.json", "report.md"


class Run(Protocol):
    """A benchmark with its tools ready; ``digest`` is that of its data."""

    digest: str

    def episodes(self) -> Iterator[Episode]:
        """All of them, whether or not they have been run."""
        ...

    def report(
        self, done: Mapping[str, Entry]
    ) -> tuple[dict[str, Any], str, list[tuple[str, str]]]:
        """The report as JSON and as Markdown, and the pages of the tasks by name."""
        ...


def run_benchmark(config: EvalConfig, progress: Progress | None = None) -> str:
    """Evaluates a model on a benchmark; returns the report's table.

    Raises:
        RunError: the data is not the benchmark's, the folder holds another run, or the model
            cannot be asked any more; what has ended is kept.
    """
    assert config.benchmark is not None
    out = Path(config.out or f"runs/eval-{config.benchmark}")
    runs: dict[str, Callable[[EvalConfig, Path], AbstractContextManager[Run]]] = {
        "gta": gta_run,
        "gaia": gaia_run,
    }
    with runs[config.benchmark](config, out) as run, Journal(out / JOURNAL) as journal:
        done = _resumed(journal, _identity(config, run.digest), out)
        left = [episode for episode in run.episodes() if episode.key not in done]
        if left:
            model = load_chat(config)
            _run_all(config, model, left, journal, done, progress)
        report, page, transcripts = run.report(done)
    write_atomically(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / PAGE, page)
    for name, text in transcripts:
        write_atomically(out / "transcripts" / f"{name}.md", text)
    return f"{page}\n{out / REPORT}"


def _run_all(
    config: EvalConfig,
    model: ChatModel,
    left: Sequence[Episode],
    journal: Journal,
    done: dict[str, Entry],
    progress: Progress | None,
) -> None:
    bar = progress.add_task(config.benchmark or "", total=len(left)) if progress else None

    def on_end(entry: Entry) -> None:
        journal.append(entry)
        done[entry["key"]] = entry
        if progress and bar is not None:
            progress.update(bar, advance=1)

    run_episodes(
        model, left, concurrency=config.bench.concurrency, reflect=config.reflect, on_end=on_end
    )


def _identity(config: EvalConfig, digest: str) -> dict[str, Any]:
    """What must be the same for a run to go on; the mode, limit and scorer may change."""
    bench = asdict(config.bench)
    tools = {name: bench[name] for name in ("local_tools", "server", "max_steps", "images")}
    identity = {
        "benchmark": config.benchmark,
        "data": digest,
        "model": config.model,
        "endpoint": config.bench.endpoint.base_url,
        "rollout": config.rollout.base_url,
        "reflect": config.reflect,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        **tools,
    }
    return json.loads(json.dumps(identity))


def _resumed(journal: Journal, identity: dict[str, Any], out: Path) -> dict[str, Entry]:
    if not journal.entries:
        journal.append({"run": identity})
    first, *entries = journal.entries
    before = first.get("run") if isinstance(first, dict) else None
    if not isinstance(before, dict):
        raise RunError(f"{out / JOURNAL} is no journal of a benchmark; expected a new folder")
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        what = ", ".join(f"{k} {before.get(k)!r} (now {identity[k]!r})" for k in changed)
        raise RunError(f"{out} holds another run: {what}; expected a new folder as out")
    return {entry["key"]: entry for entry in entries}


def load_chat(config: EvalConfig) -> ChatModel:
    """The model of a configuration, as a chat model."""
    endpoint = config.bench.endpoint
    if endpoint.base_url is not None:
        return EndpointChat(
            endpoint,
            read_key("bench.endpoint.api_key_env", endpoint.api_key_env),
            model=config.model,
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            seed=config.seed,
        )
    # torch takes seconds to import, and an endpoint needs none.
    from regrpo.evaluate import load_policy
    from regrpo.modeling import base_model
    from regrpo.sampling import LocalPolicy

    policy = load_policy(config)
    length = None
    if isinstance(policy, LocalPolicy):
        text = base_model(policy.model).config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        length = None if positions is None else positions - config.max_new_tokens + 1
    return PolicyChat(policy, length)
