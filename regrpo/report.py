"""What people look at: transcripts, the comparison table, learning curves."""

from rich.console import Console
from rich.text import Text

from regrpo.records import Record
from regrpo.rollout import Trajectory, TurnRecord
from regrpo.tools import Status
from regrpo.trigger import Clause

STATUS_STYLE = {Status.OK: "green", Status.ERROR: "red", Status.EMPTY: "yellow"}


def transcript(trajectory: Trajectory) -> Record:
    """A trajectory as a JSON-serialisable record."""
    task = trajectory.start.task
    return {
        "id": task.id,
        "family": task.family,
        "question": task.question,
        "expected": task.answer,
        "answer": trajectory.answer,
        "success": trajectory.success,
        "turns": [
            {
                "step": turn.step,
                "text": turn.text,
                "observation": turn.observation.text,
                "status": turn.observation.status.value,
                "correction": turn.correction,
                "reflection_tokens": turn.reflection_tokens,
                "confidence": turn.confidence,
                "fired": turn.fired.value if turn.fired else None,
            }
            for turn in trajectory.turns
        ],
    }


def print_transcript(trajectory: Trajectory, console: Console | None = None) -> None:
    """Prints a trajectory: the question, every turn, every observation coloured by its status."""
    console = console or Console()
    task = trajectory.start.task
    console.print(Text(f"Task: {task.question}", style="bold"))
    for turn in trajectory.turns:
        print_turn(turn, console)
    expected = f" (expected {task.answer})" if task.answer else ""
    console.print(Text(f"Answer: {trajectory.answer}{expected}\n", style="bold"))


def print_turn(turn: TurnRecord, console: Console) -> None:
    """Prints one turn and its observation."""
    console.print(Text(turn.text.strip(), style="cyan" if turn.correction else ""))
    console.print(
        Text(
            f"[step {turn.step}, {turn.observation.status.value}] {turn.observation.text}",
            style=STATUS_STYLE[turn.observation.status],
        )
    )
    if turn.fired is Clause.CONFIDENCE:
        console.print(Text("[less sure than before: reflecting]", style="yellow"))
