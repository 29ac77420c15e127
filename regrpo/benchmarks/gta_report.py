"""A run on GTA: its episodes, and what is reported of them."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrpo.benchmarks.answers import SCORERS, Similarity, answer_score, embedding_similarity
from regrpo.benchmarks.episodes import Entry, Episode
from regrpo.benchmarks.gta import FILE, GtaData, GtaTask, read_gta
from regrpo.benchmarks.gta_dialogs import opening, prediction, prefixes, recorded
from regrpo.benchmarks.gta_scores import (
    EndPrediction,
    StepPrediction,
    end_scores,
    judged_counts,
    oracle,
    step_scores,
)
from regrpo.benchmarks.pages import episode_text, listing, table
from regrpo.config import EvalConfig
from regrpo.image_files import readable_image
from regrpo.tool_calls import ToolCall, ToolCallError, parse_turn
from regrpo.tools import Status
from regrpo.tools.gta.drawing import open_image
from regrpo.tools.gta.files import EpisodeFiles
from regrpo.tools.gta.server import ToolServer
from regrpo.tools.gta.toolbox import Toolbox
from regrpo.trajectory import End

STEP = ("InstAcc", "ToolAcc", "ArgAcc", "SummAcc")
END = ("AnsAcc", "ToolAcc", "CodeExec", "P", "O", "L", "C")


@contextmanager
def gta_run(config: EvalConfig, out: Path) -> Iterator["GtaRun"]:
    """The run of a configuration, with its tools ready."""
    assert config.data is not None
    data, bench = read_gta(config.data), config.bench
    similarity = embedding_similarity(bench.similarity) if bench.similarity else None
    server = ToolServer(bench.server, timeout_s=bench.server_timeout_s) if bench.server else None
    try:
        with Toolbox(
            local=bench.local_tools, server=server, code_timeout_s=bench.tool_timeout_s
        ) as toolbox:
            yield GtaRun(config, data, toolbox, out, similarity)
    finally:
        if server is not None:
            server.close()


class GtaRun:
    """Episodes ``step/TASK/INDEX`` and ``end/TASK``, by mode."""

    def __init__(
        self,
        config: EvalConfig,
        data: GtaData,
        toolbox: Toolbox,
        out: Path,
        similarity: Similarity | None,
    ) -> None:
        self._config, self._toolbox, self._out = config, toolbox, out
        self._similarity = similarity
        self._tasks, self._root = data.tasks[: config.bench.limit], data.root
        self._problems = [*data.problems, *self._file_problems()]
        self._modes = ("step", "end") if config.bench.mode == "both" else (config.bench.mode,)
        path = Path(config.data or "")
        file = path / FILE if path.is_dir() else path
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]

    def _file_problems(self) -> list[str]:
        found = []
        for task in self._tasks:
            for name in task.files:
                try:
                    open_image((self._root / name).read_bytes(), name)
                except OSError as error:
                    found.append(f"task {task.id}: file '{name}': {error.strerror}")
                except ValueError as error:
                    found.append(f"task {task.id}: {error}")
        return found

    def _shown(self, task: GtaTask) -> list[bytes] | None:
        """The images of a task that can be read; None if images are not shown."""
        if not self._config.bench.images:
            return None
        files = [self._root / name for name in task.files]
        return [data for path in files if (data := readable_image(path)) is not None]

    def episodes(self) -> Iterator[Episode]:
        """All of them, whether or not they have been run."""
        for task in self._tasks:
            if "step" in self._modes:
                shown = self._shown(task)
                for index, messages in enumerate(prefixes(task, len(shown or ()))):
                    yield Episode(f"step/{task.id}/{index}", messages, None, 1, images=shown)
            if "end" in self._modes:
                yield self._whole(task)

    def _whole(self, task: GtaTask) -> Episode:
        known = recorded(task)
        files = EpisodeFiles(self._root, task.files, self._out / "images" / task.id)

        def execute(call: ToolCall) -> Any:
            return self._toolbox.call(call, task.tools, known, files)

        shown, limit = self._shown(task), self._config.bench.max_steps
        messages = opening(task, len(shown or ()))
        return Episode(f"end/{task.id}", messages, execute, limit, images=shown)

    def report(
        self, done: Mapping[str, Entry]
    ) -> tuple[dict[str, Any], str, list[tuple[str, str]]]:
        """The report as JSON and as Markdown, and the pages of the tasks."""
        steps = {task.id: self._predictions(task, done) for task in self._tasks}
        ends = {
            t.id: end_prediction(done[f"end/{t.id}"]) for t in self._tasks if f"end/{t.id}" in done
        }
        gold_steps, gold_ends = oracle(self._tasks)
        report: dict[str, Any] = {
            "benchmark": "gta",
            "model": self._config.model,
            "tasks": len(self._tasks),
            "scorers": {},
        }
        for scorer in SCORERS:
            kinds: dict[str, Any] = judged_counts(scorer, self._tasks, self._similarity)
            if "step" in self._modes:
                kinds["step"] = {
                    name: step_scores(scorer, self._tasks, made, self._similarity)
                    for name, made in (("model", steps), ("reference", gold_steps))
                }
            if "end" in self._modes:
                kinds["end"] = {
                    name: end_scores(scorer, self._tasks, made, self._similarity)
                    for name, made in (("model", ends), ("reference", gold_ends))
                }
            report["scorers"][scorer] = kinds
        failures = [
            f"{key}: {entry['end']}"
            for key, entry in done.items()
            if entry["end"] not in {end.value for end in End}
        ]
        report |= {
            "problems": self._problems,
            "failures": failures,
            "tool_calls": dict(self._toolbox.counts),
            "ends": dict(Counter(e["end"] for key, e in done.items() if key.startswith("end/"))),
        }
        pages = [(task.id, self._transcript(task, done)) for task in self._tasks]
        return report, self._page(report), pages

    def _predictions(self, task: GtaTask, done: Mapping[str, Entry]) -> list[StepPrediction]:
        found = []
        for index in range(len(task.steps) + (task.answer is not None)):
            entry = done.get(f"step/{task.id}/{index}")
            turns = entry["turns"] if entry else []
            made = prediction(task, turns[0]["text"]) if turns else StepPrediction(error="no turn")
            found.append(made)
        return found

    def _page(self, report: dict[str, Any]) -> str:
        scorer = self._config.bench.scorer
        scores = report["scorers"][scorer]
        parts = [
            f"# GTA: {report['model']}\n",
            f"{report['tasks']} tasks, scorer `{scorer}`, in percent.",
        ]
        for mode, title, columns in (
            ("step", "Step by step", STEP),
            ("end", "End to end", END),
        ):
            if mode in scores:
                rows = [
                    ("model", scores[mode]["model"]),
                    ("reference dialogs", scores[mode]["reference"]),
                ]
                parts.append(f"\n## {title}\n\n{table(columns, rows)}")
        left_out = scores["answers_with_references_not_judged"]
        if left_out:
            parts.append(f"\n{left_out} tasks with reference texts are not judged by this scorer.")
        parts.append(listing("Problems of the data", report["problems"]))
        parts.append(listing("Episodes that failed", report["failures"]))
        calls = [f"{name}: {count}" for name, count in report["tool_calls"].items()]
        parts.append(listing("Tool calls of this run, kinds", calls))
        return "\n".join(part for part in parts if part) + "\n"

    def _transcript(self, task: GtaTask, done: Mapping[str, Entry]) -> str:
        parts = [
            f"# GTA task {task.id}\n",
            f"{task.question}\n",
            f"References: {task.references}\n",
        ]
        if "end" in self._modes:
            entry = done.get(f"end/{task.id}")
            if entry is not None:
                answer = entry["answer"] or ""
                scores = {
                    s: answer_score(s, answer, task.references, self._similarity) for s in SCORERS
                }
                parts.append(f"Answer scores: {scores}\n")
            parts.append(episode_text("End to end", entry))
        if "step" in self._modes:
            for index in range(len(task.steps) + (task.answer is not None)):
                entry = done.get(f"step/{task.id}/{index}")
                parts.append(episode_text(f"Step {index}", entry))
                due = task.steps[index].call.render() if index < len(task.steps) else task.answer
                parts.append(f"Reference: {due}\n")
        return "\n".join(parts)


def end_prediction(entry: Entry) -> EndPrediction:
    """What counts of an episode; a call counts whether or not it failed."""
    names = []
    for turn in entry["turns"]:
        try:
            name = parse_turn(turn["text"]).call.name
        except ToolCallError:
            continue
        if name != "final_answer":
            names.append(name)
    failed = sum(turn["status"] == Status.ERROR.value for turn in entry["turns"])
    return EndPrediction(tuple(names), len(entry["turns"]), failed, entry["answer"])
