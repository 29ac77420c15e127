"""An environment that remembers on disk what it has executed."""

import base64
import hashlib
from collections.abc import Sequence

from regrpo.environment import Environment, Workspace
from regrpo.journal import Journal
from regrpo.tools import Observation, Status


class Recording:
    """An `Environment`: a batch of requests that the journal holds is not executed again."""

    def __init__(self, environment: Environment, journal: Journal) -> None:
        self._environment = environment
        self._journal = journal
        self._known = {entry["key"]: entry["observations"] for entry in journal.entries}

    def execute(self, requests: Sequence[tuple[Workspace, str]]) -> list[Observation]:
        """See `Environment.execute`."""
        key = hashlib.sha256(repr(requests).encode()).hexdigest()
        if key not in self._known:
            observations = self._environment.execute(requests)
            told = [[o.status.value, o.text, _base64(o.image)] for o in observations]
            entry = {"key": key, "observations": told}
            self._journal.append(entry)
            self._known[key] = entry["observations"]
        return [
            Observation(text, Status(status), None if image is None else base64.b64decode(image))
            for status, text, image in self._known[key]
        ]


def _base64(image: bytes | None) -> str | None:
    return None if image is None else base64.b64encode(image).decode()
