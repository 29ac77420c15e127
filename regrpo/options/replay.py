"""Same-state replay: what was sampled earlier joins a group whose outcomes are all the same.

After "R^3: Replay, Reflection, and Ranking Rewards for LLM Reinforcement Learning" (arXiv
2601.19620), its cross-context replay. The newest success and the newest failure of a state are
kept; to a collapsed group of the same state the one with the other outcome is added:

    group' = group + {replayed},  advantages over group',  ratio = pi / pi_then

with the log-probabilities of the policy that sampled it, so the clip bounds how much old words
count.

Left out: R3's in-context reflection on failures, which is what ReGRPO does anyway, and its entropy
ranking of failures.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from regrpo.images import Image
from regrpo.options.resampling import Group, collapsed
from regrpo.rollout import Trajectory, TurnRecord
from regrpo.segments import TokenizedTrajectory
from regrpo.tools import Observation, Status
from regrpo.trajectory import Start

Entry = dict[str, Any]


def state_key(start: Start) -> str:
    """The same for the same task, step and conversation so far."""
    text = json.dumps([start.task.id, start.step, start.expected, start.messages])
    return hashlib.sha256(b"".join([text.encode(), *start.images])).hexdigest()


def pack(t: Trajectory) -> Entry:
    """A trajectory as plain data, for a checkpoint."""
    turns = [
        [r.step, r.text, [o.text, o.status.value, o.image], r.correction, r.reflection_tokens]
        for r in t.turns
        for o in [r.observation]
    ]
    return {
        "key": state_key(t.start),
        "tokens": {name: value for name, value in vars(t.tokens).items() if name != "images"},
        "images": [list(vars(image).values()) for image in t.tokens.images.values()],
        "turns": turns,
        "success": t.success,
        "answer": t.answer,
    }


def unpack(entry: Entry, start: Start) -> Trajectory:
    """The trajectory again, from the state that it started in."""
    turns = [
        TurnRecord(step, text, Observation(seen, Status(status), image), correction, reflection)
        for step, text, (seen, status, image), correction, reflection in entry["turns"]
    ]
    tokens = TokenizedTrajectory()
    for name, values in entry["tokens"].items():
        setattr(tokens, name, list(values))
    tokens.images = {image.key: image for image in (Image(*row) for row in entry["images"])}
    return Trajectory(
        start,
        tokens,
        turns,
        step=turns[-1].step,
        done=True,
        success=entry["success"],
        answer=entry["answer"],
        origin="replay",
    )


def join_replays(
    groups: Sequence[Group], entries: list[Entry], capacity: int
) -> tuple[list[Group], dict[str, float]]:
    """Groups with replays joined, and metrics; ``entries`` then hold this update's own as well.

    Args:
        entries: plain data, oldest first, at most ``capacity``; changed in place.
    """
    found = {(entry["key"], entry["success"]): entry for entry in entries}
    joined, result = 0, []
    for group in groups:
        group = list(group)
        start = group[0].start
        entry = found.get((state_key(start), not group[0].success)) if collapsed(group) else None
        if entry is not None:
            group.append(unpack(entry, start))
            joined += 1
        result.append(group)
    for t in (t for group in groups for t in group if t.origin == "policy"):
        key = (state_key(t.start), t.success)
        found.pop(key, None)  # the newest goes to the end
        found[key] = pack(t)
    entries[:] = list(found.values())[-capacity:]
    return result, {"replay/joined": joined, "replay/stored": len(entries)}
