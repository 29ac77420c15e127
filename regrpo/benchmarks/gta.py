"""The GTA benchmark (open-compass/GTA, arXiv 2407.08713): its file, read and checked.

A data file maps task ids to ``{tools, files, dialogs, gt_answer}``. A dialog is a question, then
calls (one each) with the outputs of the real tools, then an answer or, where an image was asked
for, none.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrpo.benchmarks.answers import References, Whitelist
from regrpo.errors import RunError
from regrpo.tool_calls import ToolCall
from regrpo.tools.gta.specs import GTA_TOOLS

FILE = "dataset.json"
MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class GtaStep:
    """A reference call with the output that was recorded; an image is the path of one."""

    call: ToolCall
    thought: str
    output: str


@dataclass(frozen=True)
class GtaTask:
    """One task.

    Attributes:
        tools: names that the task offers.
        files: paths relative to the data folder.
        answer: the reference dialog's; None where it ends with an image.
        references: what an answer is judged by.
    """

    id: str
    question: str
    tools: tuple[str, ...]
    files: tuple[str, ...]
    steps: tuple[GtaStep, ...]
    answer: str | None
    references: References


@dataclass(frozen=True)
class GtaData:
    """The tasks, the folder that their files are in, and what is wrong with some."""

    tasks: list[GtaTask]
    root: Path
    problems: list[str]


def read_gta(data: str | Path) -> GtaData:
    """Reads a data folder (its ``dataset.json``) or a file of the same form.

    A task that is malformed is left out and named in ``problems``.

    Raises:
        RunError: nothing there is GTA.
    """
    path = Path(data)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(
            f"data: {str(data)!r} is no GTA data; expected a folder with {FILE}, or such a file"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"data: {file} is no JSON: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise RunError(f"data: {file} holds no GTA tasks; expected an object with one a task id")
    tasks, problems = [], []
    for name, value in raw.items():
        try:
            tasks.append(parse_task(name, value))
        except MALFORMED as error:
            problems.append(f"task {name}: malformed: {type(error).__name__}: {error}")
    if not tasks:
        raise RunError(f"data: {file} holds no GTA task; the first problem: {problems[0]}")
    return GtaData(tasks, file.parent, problems)


def parse_task(name: str, raw: dict[str, Any]) -> GtaTask:
    """One task of a data file. Raises one of ``MALFORMED``."""
    if Path(name).name != name:  # it names a page of the report
        raise ValueError(f"task id {name!r}; expected one without slashes")
    tools = tuple(tool["name"] for tool in raw["tools"])
    unknown = set(tools) - GTA_TOOLS.keys()
    if unknown:
        raise ValueError(f"unknown tools {sorted(unknown)}")
    files = tuple(_relative(file["path"]) for file in raw["files"])
    first, *dialog = raw["dialogs"]
    if first["role"] != "user":
        raise ValueError(f"the dialog begins with {first['role']!r}; expected 'user'")
    steps, answer = [], None
    while dialog:
        turn = dialog.pop(0)
        if turn["role"] != "assistant" or answer is not None:
            raise ValueError(f"a turn of {turn['role']!r} where the assistant's was expected")
        if "tool_calls" not in turn:
            answer = _text(turn["content"])
            continue
        (made,) = turn["tool_calls"]
        seen = dialog.pop(0)
        if seen["role"] != "tool":
            raise ValueError(f"a turn of {seen['role']!r} behind a call; expected 'tool'")
        function = made["function"]
        call = ToolCall(_text(function["name"]), (), dict(function["arguments"]))
        if call.name not in GTA_TOOLS:
            raise ValueError(f"unknown tool {call.name!r}")
        call.render()  # raises for what no call can hold
        thought = " ".join(turn.get("thought", "").replace("```", "").split())
        steps.append(GtaStep(call, thought, _text(seen["content"]["content"])))
    if not steps and answer is None:
        raise ValueError("the dialog has no step")
    references = _references(raw["gt_answer"])
    return GtaTask(
        name, _text(first["content"]).strip(), tools, files, tuple(steps), answer, references
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} where text was expected")
    return value


def _relative(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"file {path!r}; expected a path inside the data folder")
    return path


def _references(raw: Any) -> References:
    if not raw:
        return None
    if isinstance(raw, list):
        return tuple(map(_text, raw))
    groups = tuple(tuple(map(_text, group)) for group in raw["whitelist"])
    if not groups or not all(groups) or not all(alias for group in groups for alias in group):
        raise ValueError(f"whitelist {raw['whitelist']!r:.60}; expected groups of aliases")
    blacklist = tuple(tuple(map(_text, group)) for group in raw.get("blacklist") or ())
    return Whitelist(groups, blacklist)
