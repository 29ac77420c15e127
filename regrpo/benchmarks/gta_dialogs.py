"""GTA's dialogs in the layout of this project: prompts, predictions, records, training states."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regrpo.benchmarks.answers import answer_score
from regrpo.benchmarks.gta import MALFORMED, GtaTask, parse_task
from regrpo.benchmarks.gta_scores import StepPrediction
from regrpo.environment import Workspace
from regrpo.prompts import observation_turn, shown_images, system_prompt
from regrpo.records import Record, RecordError
from regrpo.tasks import Step, Task
from regrpo.tool_calls import ToolCall, ToolCallError, Turn, parse_turn
from regrpo.tools import Observation, Status, call_tool, signature_text
from regrpo.tools.answer import final_answer
from regrpo.tools.gta.files import EpisodeFiles
from regrpo.tools.gta.specs import GTA_TOOLS
from regrpo.tools.gta.toolbox import Recordings, Toolbox, recordings
from regrpo.tools.observation import failure
from regrpo.trajectory import Message, Start
from regrpo.workspace import TextFile

_MARKER = "gta_task"


def opening(task: GtaTask, images: int = 0) -> list[Message]:
    """The system turn with the task's tools, and the question with the names of its files.

    Args:
        images: how many are shown behind it.
    """
    lines = [GTA_TOOLS[name].describe() for name in task.tools]
    files = f"\nFiles: {', '.join(task.files)}" if task.files else ""
    return [
        {"role": "system", "content": system_prompt([*lines, signature_text(final_answer)])},
        {"role": "user", "content": f"Task: {task.question}{files}{shown_images(images)}"},
    ]


def reference_turns(task: GtaTask) -> list[Turn]:
    """The reference calls as turns, and the answer where there is one."""
    turns = [_turn(step.thought, step.call) for step in task.steps]
    if task.answer is not None:
        turns.append(_turn("I know the answer.", ToolCall("final_answer", (task.answer.strip(),))))
    return turns


def _turn(thought: str, call: ToolCall) -> Turn:
    try:
        return Turn(None, thought, call)
    except ValueError:  # it begins like another part of a turn
        return Turn(None, f"({thought})", call)


def prefixes(task: GtaTask, images: int = 0) -> list[list[Message]]:
    """The conversation before every reference turn; see ``opening``."""
    messages, found = opening(task, images), []
    for index, turn in enumerate(reference_turns(task)):
        found.append(list(messages))
        messages.append({"role": "assistant", "content": turn.render()})
        if index < len(task.steps):
            seen = observation_turn(index, task.steps[index].output)
            messages.append({"role": "user", "content": seen})
    return found


def prediction(task: GtaTask, text: str) -> StepPrediction:
    """What a turn says to do; nothing is executed."""
    try:
        call = parse_turn(text).call
    except ToolCallError as error:
        return StepPrediction(error=f"SyntaxError: {error}")
    if call.name == "final_answer":
        seen = call_tool(Path(), call)
        if seen.status is Status.OK:
            return StepPrediction(answer=seen.text)
        return StepPrediction(answer="", error=seen.text)
    if call.name not in task.tools:
        return StepPrediction(call=call, error=f"NameError: {call.name} is not among the tools")
    try:
        GTA_TOOLS[call.name].bind(call)
    except TypeError as error:
        return StepPrediction(call=call, error=f"TypeError: {error}")
    return StepPrediction(call=call)


def recorded(task: GtaTask) -> Recordings:
    """What replay knows of a task.

    A recorded call whose arguments are not its tool's is left out: it cannot be made again.
    """
    known = []
    for step in task.steps:
        try:
            GTA_TOOLS[step.call.name].bind(step.call)
        except TypeError:
            continue
        known.append((step.call, step.output))
    return recordings(known)


def gta_records(values: dict[str, Any], where: str) -> Iterator[tuple[str, Record | RecordError]]:
    """The reference dialogs of a data file, each with its place; an error in place of a bad one."""
    for name, raw in values.items():
        place = f"{where}[{name}]"
        try:
            yield place, to_record(parse_task(name, raw))
        except MALFORMED as error:
            reason = f"{type(error).__name__}: {error}"
            yield place, RecordError(f"{place}: {reason}; expected a task of GTA")


def to_record(task: GtaTask) -> Record:
    """The reference dialog as a training record (`regrpo.records`).

    A dialog that ends with an image gets an answer, which is the path of the image.
    """
    messages = opening(task)
    for index, turn in enumerate(reference_turns(task)):
        messages.append({"role": "assistant", "content": turn.render()})
        if index < len(task.steps):
            seen = observation_turn(index, task.steps[index].output)
            messages.append({"role": "user", "content": seen})
    if messages[-1]["role"] == "user":  # an image was asked for, and the dialog ends with it
        done = Turn(None, "The image is made.", ToolCall("final_answer", (task.steps[-1].output,)))
        messages.append({"role": "assistant", "content": done.render()})
    return {
        "id": f"gta-{task.id}",
        "image": {str(i): path for i, path in enumerate(task.files)},
        "answer": task.answer if task.answer is not None else task.steps[-1].output,
        "conversations": messages,
    }


def to_task(task: GtaTask) -> Task:
    """A task of `regrpo.rollout`; its workspace names it to `GtaEnvironment`."""
    steps = [Step(turn.call) for turn in reference_turns(task)]
    question = opening(task)[1]["content"].removeprefix("Task: ")
    workspace = (TextFile(_MARKER, task.id),)
    return Task(f"gta-{task.id}", "gta", question, _expected(task), workspace, tuple(steps))


def _expected(task: GtaTask) -> str:
    return task.answer.strip() if task.answer is not None else task.steps[-1].output


def to_starts(task: GtaTask, images: Sequence[bytes] = ()) -> list[Start]:
    """Every state of the reference dialog, for `regrpo.rollout.run` in a `GtaEnvironment`;
    ``images`` are shown with the question."""
    made = to_task(task)
    outputs = [*(step.output for step in task.steps), _expected(task)]
    return [
        Start(made, tuple(told), step=index, expected=outputs[index], images=tuple(images))
        for index, told in enumerate(prefixes(task, len(images)))
    ]


class GtaEnvironment:
    """Executes turns on GTA tasks (`regrpo.environment.Environment`).

    ``final_answer`` observes the reference answer where the scorer accepts what was given, so that
    the success of an episode is the scorer's.

    Args:
        toolbox: entered by the caller.
        root: the data folder.
        scorer: that of answers; one that it does not judge must be the reference's.
    """

    def __init__(
        self, tasks: Sequence[GtaTask], toolbox: Toolbox, root: Path, scorer: str = "fixed"
    ) -> None:
        self._tasks = {task.id: (task, recorded(task)) for task in tasks}
        self._toolbox, self._root, self._scorer = toolbox, root, scorer

    def execute(self, requests: Sequence[tuple[Workspace, str]]) -> list[Observation]:
        """See `regrpo.environment.Environment.execute`.

        Raises:
            ValueError: a workspace is not that of one of the tasks.
        """
        return [self._one(workspace, text) for workspace, text in requests]

    def _one(self, workspace: Workspace, text: str) -> Observation:
        marker = workspace[0] if isinstance(workspace, tuple) and workspace else None
        name = marker.content if isinstance(marker, TextFile) and marker.path == _MARKER else None
        if name not in self._tasks:
            raise ValueError(f"workspace {str(workspace)[:60]}: expected that of a GTA task")
        task, known = self._tasks[name]
        try:
            call = parse_turn(text).call
        except ToolCallError as error:
            return failure(SyntaxError(str(error)))
        if call.name == "final_answer":
            seen = call_tool(Path(), call)
            right = answer_score(self._scorer, seen.text, task.references) == 1.0
            return Observation(_expected(task), seen.status) if right else seen
        files = EpisodeFiles(self._root, task.files)
        return self._toolbox.call(call, task.tools, known, files)
