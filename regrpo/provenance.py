"""Where the observations of a record come from.

What this project adds to a record of the official schema stands under one key, ``regrpo``:

- ``provenance``: the weakest origin of any observation in the conversation.
- ``failure``: the origin of the failure that ``rot_meta`` tells of.
- ``reflection``: ``teacher`` where a model wrote the triplet; without it, the observation gave it.
- ``workspace``: the files that the calls ran on, as `regrpo.workspace.file_to_dict` writes them.
- ``source``, ``mined``, ``pending``: see `data_engine.exchange` and `data_engine.mining`.
"""

from typing import Any

KEY = "regrpo"
# From the strongest to the weakest: run here; run by whoever recorded it; made up by a teacher.
PROVENANCES = ("executed", "recorded", "teacher")


def provenance(record: dict[str, Any]) -> str | None:
    """The origin of a record's observations; None if it does not say."""
    value: str | None = record.get(KEY, {}).get("provenance")
    return value


def failure_provenance(record: dict[str, Any]) -> str | None:
    """The origin of the failure in ``rot_meta``; None if there is none, or it does not say."""
    value: str | None = record.get(KEY, {}).get("failure")
    return value


def problem(block: Any) -> str | None:
    """What is wrong with the value under ``KEY``, or None."""
    if not isinstance(block, dict):
        return f"{KEY} is {block!r:.40}; expected an object"
    for name in ("provenance", "failure", "reflection"):
        if name in block and block[name] not in PROVENANCES:
            return f"{KEY}.{name} is {block[name]!r:.40}; expected one of {', '.join(PROVENANCES)}"
    return None
