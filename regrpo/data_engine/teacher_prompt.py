"""What a language model is asked about a failure, and which answers count."""

import base64
import json
import re
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from regrpo.data_engine.teacher import Case
from regrpo.tool_calls import Reflection
from regrpo.workspace import read_image

INSTRUCTIONS = (
    "An agent called a tool and the call failed; the corrected call worked. Write what the agent "
    "should note between the two, from what it has seen: the task, the failed call and the "
    "observation. evidence: the decisive words of the observation, copied exactly, on one line. "
    "fix_plan: one line that says what to do next; it follows from the evidence and names what the "
    "corrected call uses."
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"evidence": {"type": "string"}, "fix_plan": {"type": "string"}},
    "required": ["evidence", "fix_plan"],
    "additionalProperties": False,
}
MIN_EVIDENCE_CHARS = 4  # less is found in any observation
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def question(case: Case, *, images: bool) -> list[dict[str, Any]]:
    """The messages about a case; with ``images``, those that its calls name come as data URLs."""
    before = "".join(f"Seen before:\n{observation}\n" for observation in case.seen)
    text = (
        f"Task: {case.question}\n{before}"
        f"Failed call: {case.failed.render()}\n"
        f"Error type: {case.error_type}\nObservation:\n{case.observation}\n"
        f"Corrected call: {case.corrected.render()}"
    )
    urls = _image_urls(case) if images else []
    content: Any = text
    if urls:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [{"type": "text", "text": text}, *parts]
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": content}]


def _image_urls(case: Case) -> list[str]:
    arguments = [
        value
        for call in (case.failed, case.corrected)
        for value in (*call.args, *call.kwargs.values())
        if isinstance(value, str)
    ]
    urls = []
    for name in dict.fromkeys(arguments):
        kind = _IMAGE_TYPES.get(PurePosixPath(name).suffix.lower())
        data = read_image(case.workspace, name) if kind else None
        if data is not None:
            urls.append(f"data:{kind};base64,{base64.b64encode(data).decode()}")
    return urls


def check_answer(content: str, case: Case) -> Reflection | str:
    """The triplet that an answer gives, or what is wrong with the answer."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return "the answer is no JSON"
    if not isinstance(fields, dict) or set(fields) != set(SCHEMA["required"]):
        return "the answer is no object with evidence and fix_plan"
    for name, value in fields.items():
        if not isinstance(value, str) or len(value.strip().splitlines()) != 1:
            return f"{name} is not one line of text"
    evidence, plan = (fields[name].strip() for name in ("evidence", "fix_plan"))
    if len(evidence) < MIN_EVIDENCE_CHARS or not _cited(evidence, case.observation):
        return "evidence is not copied from the observation"
    used = (case.corrected.name, *case.corrected.args, *case.corrected.kwargs.values())
    if not any(_contains(plan, str(value)) for value in used):
        return "fix_plan does not name what the corrected call uses"
    return Reflection(case.error_type, evidence, plan)


def _cited(evidence: str, observation: str) -> bool:
    """Whole words of the observation, or names along the edges that it lists."""
    if _contains(" ".join(observation.split()), " ".join(evidence.split())):
        return True
    names = evidence.split(" -> ")
    return len(names) > 2 and all(
        _contains(observation, " -> ".join(edge)) for edge in pairwise(names)
    )


def _contains(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
