"""A run on GAIA: its episodes, and what is reported of them."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrpo.benchmarks.answers import gaia_match
from regrpo.benchmarks.episodes import Entry, Episode
from regrpo.benchmarks.gaia import (
    FILE,
    LEVELS,
    GaiaData,
    GaiaTask,
    GaiaTools,
    gaia_scores,
    opening,
    read_gaia,
)
from regrpo.benchmarks.pages import episode_text, listing, table
from regrpo.config import EvalConfig
from regrpo.image_files import readable_image
from regrpo.sandbox import Sandbox
from regrpo.tool_calls import ToolCall
from regrpo.tools import Observation
from regrpo.trajectory import End


@contextmanager
def gaia_run(config: EvalConfig, out: Path) -> Iterator["GaiaRun"]:
    """The run of a configuration, with its tools ready."""
    assert config.data is not None
    data = read_gaia(config.data)
    with Sandbox() as sandbox, tempfile.TemporaryDirectory(prefix="regrpo-gaia-") as folder:
        yield GaiaRun(config, data, GaiaTools(sandbox, data.root, Path(folder)))


class GaiaRun:
    """Episodes are whole tasks, under their ids."""

    def __init__(self, config: EvalConfig, data: GaiaData, tools: GaiaTools) -> None:
        self._config, self._tools = config, tools
        self._tasks, self._root = data.tasks[: config.bench.limit], data.root
        missing = [t for t in self._tasks if t.file and not (data.root / t.file).is_file()]
        self._problems = [*data.problems, *(f"task {t.id}: no file '{t.file}'" for t in missing)]
        path = Path(config.data or "")
        file = path / FILE if path.is_dir() else path
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]

    def episodes(self) -> Iterator[Episode]:
        """All of them, whether or not they have been run."""
        for task in self._tasks:
            yield self._whole(task)

    def _whole(self, task: GaiaTask) -> Episode:
        def execute(call: ToolCall) -> Observation:
            return self._tools.call(task, call)

        shown = None
        if self._config.bench.images:
            data = readable_image(self._root / task.file) if task.file else None
            shown = [] if data is None else [data]
        messages = opening(task, len(shown or ()))
        return Episode(task.id, messages, execute, self._config.bench.max_steps, images=shown)

    def report(
        self, done: Mapping[str, Entry]
    ) -> tuple[dict[str, Any], str, list[tuple[str, str]]]:
        """The report as JSON and as Markdown, and the pages of the tasks."""
        answers = {key: entry["answer"] for key, entry in done.items()}
        scores = gaia_scores(self._tasks, answers)
        ends = {end.value for end in End}
        failures = [f"{k}: {e['end']}" for k, e in done.items() if e["end"] not in ends]
        report = {
            "benchmark": "gaia",
            "model": self._config.model,
            "tasks": len(self._tasks),
            "scores": scores,
            "problems": self._problems,
            "failures": failures,
        }
        columns = (*(f"Level {n}" for n in LEVELS), "AnsAcc")
        page = "\n".join(
            [
                f"# GAIA: {self._config.model}\n",
                f"{len(self._tasks)} tasks, in percent.\n",
                table(columns, [("model", scores)]),
                listing("Problems of the data", self._problems),
                listing("Episodes that failed", failures),
            ]
        )
        return report, page, [(t.id, self._transcript(t, done.get(t.id))) for t in self._tasks]

    def _transcript(self, task: GaiaTask, entry: Entry | None) -> str:
        right = entry is not None and gaia_match(entry["answer"] or "", task.answer)
        head = (
            f"# GAIA task {task.id}\n\n{task.question}\n\nExpected: {task.answer}; right: {right}\n"
        )
        return f"{head}\n{episode_text('Episode', entry)}"
