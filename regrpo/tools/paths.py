"""Files of a workspace, reached without ever leaving it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from regrpo.tools.observation import Observation, failure

MAX_FILE_BYTES = 4 * 1024 * 1024


def open_inside(root: Path, path: str, *, directory: bool = False) -> int:
    """Open `path` for reading, relative to `root`, and return a file descriptor.

    Each component is opened by itself and none may be a symbolic link, so the path cannot leave
    the workspace. Raises OSError with `path` as it was given, never an absolute one.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")] or [path and "."]
    if path.startswith("/") or ".." in parts:
        raise PermissionError(errno.EACCES, "Path leaves the workspace", path)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            parent, fd = fd, os.open(part, flags, dir_fd=fd)
            os.close(parent)
        is_directory = os.path.isdir(fd)
        if is_directory != directory:
            code = errno.ENOTDIR if directory else errno.EISDIR
            raise OSError(code, os.strerror(code), path)
    except OSError as error:
        os.close(fd)
        error.filename = path
        raise
    except ValueError:  # a NUL or a lone surrogate in the path
        os.close(fd)
        raise
    return fd


def read_inside(root: Path, path: str) -> bytes:
    """The bytes of the file `path`, at most MAX_FILE_BYTES of them or ValueError."""
    with open(open_inside(root, path), "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"'{path}' is larger than {MAX_FILE_BYTES} bytes")
    return data


def listing(root: Path, path: str) -> str:
    """The entries of a folder, one a line: `name`, `name/` or `name -> target`."""
    fd = open_inside(root, path, directory=True)
    try:
        with os.scandir(fd) as entries:
            lines = []
            for entry in entries:
                if entry.is_symlink():
                    lines.append(f"{entry.name} -> {os.readlink(entry.name, dir_fd=fd)}")
                else:
                    lines.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    finally:
        os.close(fd)
    return "\n".join(hashed_order(lines))


def hashed_order(lines: Iterable[str]) -> list[str]:
    """The lines in an order that is fixed by their content and carries no information."""
    lines = sorted(lines)
    seed = hashlib.blake2b("\n".join(lines).encode(errors="surrogateescape")).digest()
    return sorted(
        lines,
        key=lambda line: hashlib.blake2b(line.encode(errors="surrogateescape"), key=seed).digest(),
    )


def path_failure(root: Path, path: str, error: OSError | ValueError) -> Observation:
    """A path that could not be opened; an OSError shows the nearest folder that exists above it."""
    if not isinstance(error, OSError):
        return failure(error)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        parts = []
    while True:
        parts = parts[:-1]
        try:
            return failure(error, listing(root, "/".join(parts) or "."))
        except OSError:
            if not parts:
                raise
