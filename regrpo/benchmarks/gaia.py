"""GAIA (arXiv 2311.12983): its ``metadata.jsonl`` and the files beside it.

The data is gated and not part of this project. A line is ``{task_id, Question, Level, "Final
answer", file_name, "Annotator Metadata"}``; ``file_name`` is empty for a task without a file.
"""

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regrpo.benchmarks.answers import gaia_match
from regrpo.errors import RunError
from regrpo.prompts import shown_images, system_prompt
from regrpo.sandbox import Sandbox
from regrpo.tool_calls import ToolCall
from regrpo.tools import TOOLS, Observation, signature_text
from regrpo.trajectory import Message

FILE = "metadata.jsonl"
LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class GaiaTask:
    """One task. ``file`` is a name in the data folder, None without one."""

    id: str
    question: str
    level: int
    answer: str
    file: str | None


@dataclass(frozen=True)
class GaiaData:
    """The tasks, the folder that their files are in, and what is wrong with some."""

    tasks: list[GaiaTask]
    root: Path
    problems: list[str]


def read_gaia(data: str | Path) -> GaiaData:
    """Reads a data folder, such as ``2023/validation`` of the release.

    Raises:
        RunError: nothing there is GAIA.
    """
    path = Path(data)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(
            f"data: {str(data)!r} is no GAIA data; expected a folder with {FILE}, or such a file"
        )
    tasks: dict[str, GaiaTask] = {}
    problems = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"data: {file}: {error}; expected UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = _task(json.loads(line))
            if task.id in tasks:
                raise ValueError(f"task_id {task.id} twice")
            tasks[task.id] = task
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            problems.append(f"{file.name}:{number}: malformed: {type(error).__name__}: {error}")
    if not tasks:
        raise RunError(f"data: {file} holds no GAIA task; problems: {problems[:1]}")
    return GaiaData(list(tasks.values()), file.parent, problems)


def _task(raw: dict[str, object]) -> GaiaTask:
    name, question, answer = raw["task_id"], raw["Question"], raw["Final answer"]
    level, file = int(str(raw["Level"])), raw.get("file_name") or None
    for value in (name, question, answer):
        if not isinstance(value, str):
            raise TypeError(f"{value!r:.40} where text was expected")
    if Path(str(name)).name != name:  # it names a folder, and a page of the report
        raise ValueError(f"task_id {name!r}; expected one without slashes")
    if level not in LEVELS:
        raise ValueError(f"Level {level}; expected one of {LEVELS}")
    if file is not None and (not isinstance(file, str) or Path(file).name != file):
        raise ValueError(f"file_name {file!r}; expected a name without folders")
    return GaiaTask(str(name), str(question), level, str(answer), file)


def opening(task: GaiaTask, images: int = 0) -> list[Message]:
    """The system turn with the built-in tools, and the question with the name of its file; its
    ``images`` are shown behind it."""
    file = f"\nFiles: {task.file}" if task.file else ""
    format_ = "\nAnswer with a number, few words, or a list of these with commas."
    return [
        {"role": "system", "content": system_prompt(map(signature_text, TOOLS))},
        {
            "role": "user",
            "content": f"Task: {task.question}{file}{format_}{shown_images(images)}",
        },
    ]


class GaiaTools:
    """The built-in tools on a folder with the task's file; for use by several threads.

    Args:
        folder: where the folders of tasks are made.
    """

    def __init__(self, sandbox: Sandbox, root: Path, folder: Path) -> None:
        self._sandbox, self._root, self._folder = sandbox, root, folder
        self._lock = threading.Lock()

    def call(self, task: GaiaTask, call: ToolCall) -> Observation:
        """The observation of a call."""
        place = self._folder / task.id
        with self._lock:
            if not place.exists():
                place.mkdir()
                source = self._root / task.file if task.file else None
                if source is not None and source.is_file():
                    shutil.copyfile(source, place / source.name)
            return self._sandbox.run([(place, call)])[0]


def gaia_scores(
    tasks: Sequence[GaiaTask], answers: Mapping[str, str | None]
) -> dict[str, float | None]:
    """AnsAcc in percent, overall and by level; a task without an answer counts as failed."""
    right = {task.id: gaia_match(answers.get(task.id) or "", task.answer) for task in tasks}

    def percent(chosen: Sequence[GaiaTask]) -> float | None:
        return 100 * sum(right[t.id] for t in chosen) / len(chosen) if chosen else None

    levels = {f"Level {n}": percent([t for t in tasks if t.level == n]) for n in LEVELS}
    return {"AnsAcc": percent(tasks), **levels}
