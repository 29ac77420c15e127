"""An append-only file of JSON lines that survives being killed at any moment."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from regrpo.errors import RunError


class Journal:
    """Entries in the order they were appended, those of former runs first; a context manager.

    What was appended is on disk. A last line that was being written when the process ended is cut
    off on opening: its entry is done again. One process at a time.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file.

        Raises:
            RunError: another process has it open, or a line before the last is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.entries = self._read(path)
        except BlockingIOError as error:
            self._file.close()
            raise RunError(f"{path} is in use by another process; wait for its end") from error
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path) -> list[Any]:
        self._file.seek(0)
        entries, good = [], 0
        lines = self._file.read().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                if number < len(lines) - 1:
                    raise RunError(f"{path}:{number} is damaged; delete the file") from error
                break
            good += len(line) + 1
        self._file.truncate(good)
        return entries

    def append(self, entry: Any) -> None:
        """Adds an entry; returns when it is on disk."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries.append(entry)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
