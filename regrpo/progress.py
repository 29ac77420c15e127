"""The live line of a run."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def disable_loading_bars() -> None:
    """Switches off transformers' bars of loading and writing weights, in this process."""
    from transformers.utils.logging import disable_progress_bar  # slow to import

    disable_progress_bar()


def progress_bar() -> Progress:
    """Description, bar, steps done and time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
