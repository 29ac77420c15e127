"""The images of one episode: those of its task, and those that its tools made."""

from pathlib import Path

from regrpo.records import write_bytes_atomically


class EpisodeFiles:
    """Paths that an episode may name, and nothing else.

    Args:
        root: folder of the data.
        names: paths of the task's files in it.
        out: folder where made images are kept; None keeps them in memory only.
    """

    def __init__(self, root: Path, names: tuple[str, ...], out: Path | None = None) -> None:
        self._root, self._names, self._out = root, names, out
        self._made: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError for a name that is not the episode's, or has no file."""
        if name in self._made:
            return self._made[name]
        path = self._root / name
        if name not in self._names or not path.is_file():
            raise FileNotFoundError(
                f"no file '{name}'; files: {', '.join([*self._names, *self._made]) or 'none'}"
            )
        return path.read_bytes()

    def add(self, png: bytes) -> str:
        """Keeps an image that a tool made; its name."""
        name = f"image/generated_{len(self._made) + 1}.png"
        self._made[name] = png
        if self._out is not None:
            write_bytes_atomically(self._out / Path(name).name, png)
        return name
