"""A folder belongs to one configuration."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrpo.errors import RunError
from regrpo.records import write_atomically


def claim(out: Path, config: dict[str, Any]) -> None:
    """Writes ``config.json`` into the folder, or checks that it holds the same.

    Raises:
        RunError: the folder holds a run of another configuration; names the keys that differ.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    text = json.dumps(config, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        before = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
        now = dict(_flat(json.loads(text)))
        keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        raise RunError(
            f"{out} holds a run with another configuration or data (differs in: "
            f"{', '.join(keys)}); choose another out, or delete the folder"
        )
    write_atomically(path, text)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys as ``optim.lr``."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
