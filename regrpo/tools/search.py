"""`search`: BM25 over the documents of the workspace."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from regrpo.tools.cache import LRU
from regrpo.tools.observation import Observation, Status
from regrpo.tools.parameters import Query
from regrpo.tools.paths import open_inside, path_failure, read_inside

FOLDER = "docs"
SEE_REFERENCES = "see.idx"
K1, B = 1.2, 0.75

_Stamp = tuple[str, int, int, int]


class Index:
    """Okapi BM25 (Robertson and Zaragoza, 2009) with Lucene's non-negative idf."""

    def __init__(self, documents: dict[str, str]) -> None:
        self.documents = documents
        self._counts = {name: Counter(_terms(text)) for name, text in documents.items()}
        self._lengths = {name: sum(counts.values()) for name, counts in self._counts.items()}
        self._frequency = Counter(term for counts in self._counts.values() for term in counts)
        self._mean_length = sum(self._lengths.values()) / max(len(documents), 1)

    def best(self, query: str) -> str | None:
        """Name of the document that scores highest, None if no term of the query occurs."""
        terms = [term for term in _terms(query) if term in self._frequency]
        if not terms:
            return None
        return max(sorted(self.documents), key=lambda name: self._score(name, terms))

    def _score(self, name: str, terms: list[str]) -> float:
        counts = self._counts[name]
        norm = K1 * (1 - B + B * self._lengths[name] / self._mean_length)
        return sum(
            self._idf(term) * counts[term] * (K1 + 1) / (counts[term] + norm) for term in terms
        )

    def _idf(self, term: str) -> float:
        found = self._frequency[term]
        return math.log(1 + (len(self.documents) - found + 0.5) / (found + 0.5))


@dataclass(frozen=True)
class _Library:
    index: Index
    see_references: str


_libraries: LRU[tuple[str, tuple[_Stamp, ...]], _Library] = LRU(256)


def search(root: Path, query: Query) -> Observation:
    """The document that matches the query best, as `name: text`.

    Without a match the observation is empty and shows the library's see-references, if it has any.
    """
    try:
        stamps = _stamps(root)
        library = _libraries.get((str(root), stamps), lambda: _read(root, stamps))
        _libraries.trim()
    except (OSError, ValueError) as error:
        return path_failure(root, FOLDER, error)
    name = library.index.best(query)
    if name is not None:
        return Observation(f"{name}: {library.index.documents[name]}", Status.OK)
    text = f"no results for {query!r}"
    if library.see_references:
        text = f"{text}\n{library.see_references}"
    return Observation(text, Status.EMPTY)


def _stamps(root: Path) -> tuple[_Stamp, ...]:
    """What changes when a document does."""
    fd = open_inside(root, FOLDER, directory=True)
    try:
        with os.scandir(fd) as entries:
            found = [
                (entry.name, entry.stat(follow_symlinks=False))
                for entry in entries
                if entry.is_file(follow_symlinks=False)
                and (entry.name.endswith(".txt") or entry.name == SEE_REFERENCES)
            ]
    finally:
        os.close(fd)
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in found))


def _read(root: Path, stamps: tuple[_Stamp, ...]) -> _Library:
    texts = {
        name: read_inside(root, f"{FOLDER}/{name}").decode("utf-8").strip() for name, *_ in stamps
    }
    see_references = texts.pop(SEE_REFERENCES, "")
    return _Library(
        Index({name.removesuffix(".txt"): text for name, text in texts.items()}), see_references
    )


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
