"""The live line of a run."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def disable_loading_bars() -> None:
    """Switches off transformers' bars of loading and writing weights, in this process."""
    from transformers.utils.logging import disable_progress_bar  # slow to import

    disable_progress_bar()


def progress_bar(*, shown: bool = True) -> Progress:
    """Description, bar, steps done and time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=600,  # seconds: an update may take minutes
        disable=not shown,
    )


def live_line(name: str, metrics: Mapping[str, float], shown: Sequence[str]) -> str:
    """What a step did, in a few words: ``name``, some metrics, and tokens a second."""
    parts = [f"{metric.split('/')[0]} {metrics[metric]:.2f}" for metric in shown]
    return "  ".join([name, *parts, f"{metrics['time/tokens_per_s']:,.0f} tok/s"])
