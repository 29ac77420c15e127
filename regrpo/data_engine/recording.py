"""An environment that remembers on disk what it has executed."""

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
            entry = {"key": key, "observations": [[o.status.value, o.text] for o in observations]}
            self._journal.append(entry)
            self._known[key] = entry["observations"]
        return [Observation(text, Status(status)) for status, text in self._known[key]]
