"""Metrics to Weights & Biases or trackio, for who asks: ``log_to``. Neither is a dependency."""

import importlib
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from regrpo.errors import RunError
from regrpo.records import write_atomically

PROJECT = "regrpo"


def require_trackers(names: Sequence[str]) -> None:
    """Raises a ``RunError`` for a tracker that is not installed; imports nothing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RunError(f"log_to names {name}, which is not installed: pip install {name}")


class Trackers:
    """The runs of a folder at its trackers. A folder that is gone on with goes on with them."""

    def __init__(self, names: Sequence[str], out: Path, config: Mapping[str, Any]):
        self._modules: list[ModuleType] = [importlib.import_module(name) for name in names]
        if not names:
            return
        path = out / "tracker_run_id"
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8])
        run_id = path.read_text(encoding="utf-8")
        for module in self._modules:
            # wandb finds a run by its id, trackio by its name.
            own = {"id": run_id} if module.__name__ == "wandb" else {}
            name = f"{out.resolve().name}-{run_id}"
            module.init(project=PROJECT, name=name, config=dict(config), resume="allow", **own)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for module in self._modules:
            module.log(dict(metrics), step=step)

    def finish(self) -> None:
        for module in self._modules:
            module.finish()
