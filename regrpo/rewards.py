"""The training-time verifier: what a trajectory's words are worth, from what was executed.

    V = 0.25 s_answer + 0.5 s_grounding + 0.25 s_plan          (arXiv 2606.31392)

Each score is in [0, 1] and deterministic; no model judges. The paper gives the weights; how the
scores are computed is ours:

- ``s_answer``: agreement of the last observation (the answer, where one was given) with the
  expected one.
- ``s_grounding``: share of the Evidence that cites rare spans of the failed observation.
- ``s_plan``: share of what the corrected call changed that the FixPlan names.

``s_grounding`` and ``s_plan`` are means over the reflections of a trajectory, 0 without one; a turn
that does not parse scores 0.
"""

import re
from collections import Counter
from typing import Any

from regrpo.rollout import Trajectory, same_answer
from regrpo.tool_calls import ToolCall, ToolCallError, Turn, parse_turn
from regrpo.tools import Status
from regrpo.trajectory import Start

WEIGHTS = {"answer": 0.25, "grounding": 0.5, "plan": 0.25}
RARE_LINES = 2  # a span that stands in more lines of an observation tells nothing apart

_WORD = re.compile(r"\w+(?:[./-]\w+)*")


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def answer_score(given: str, expected: str) -> float:
    """F1 of the words of two answers; 1 where they are the same up to case and white space."""
    if same_answer(given, expected):
        return 1.0
    a, b = _words(given), _words(expected)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def grounding_score(evidence: str, observation: str, known: str) -> float:
    """Share of the words of the Evidence that stand in a rare span of the failed observation.

    A span is two neighbouring words (one, if the Evidence has but one). It is rare if it stands in
    one or ``RARE_LINES`` lines of the observation and nowhere in ``known``, what was told before.
    """
    words = _words(evidence)
    size = min(2, len(words))
    if size == 0:
        return 0.0
    told = _spans(known, size)
    lines = Counter(s for line in observation.splitlines() for s in set(_spans(line, size)))
    cited: set[int] = set()
    for i in range(len(words) - size + 1):
        span = tuple(words[i : i + size])
        if 1 <= lines[span] <= RARE_LINES and span not in told:
            cited.update(range(i, i + size))
    return len(cited) / len(words)


def _spans(text: str, size: int) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def plan_score(plan: str, failed: ToolCall | None, corrected: ToolCall) -> float:
    """Share of what the corrected call changed that the FixPlan names.

    What changed is the name of the tool if it is another one. Otherwise it is the words that are
    new in each argument that is not what it was, all of an argument's if none is new; and the name
    of the tool if arguments were only dropped. 0 if nothing changed. ``failed`` is None where the
    failed turn held no call.
    """
    if failed == corrected:
        return 0.0
    changed: set[str] = set()
    if failed is not None and failed.name == corrected.name:
        before = _arguments(failed)
        for key, value in _arguments(corrected).items():
            if key not in before or before[key] != value:
                words = set(_words(str(value)))
                changed |= words - set(_words(str(before.get(key, "")))) or words
    changed = changed or {corrected.name.casefold()}
    return len(changed & set(_words(plan))) / len(changed)


def _arguments(call: ToolCall) -> dict[int | str, Any]:
    arguments: dict[int | str, Any] = dict(enumerate(call.args))
    arguments.update(call.kwargs)
    return arguments


def _parsed(text: str) -> Turn | None:
    try:
        return parse_turn(text)
    except ToolCallError:
        return None


def _failures(t: Trajectory) -> list[tuple[str, str, str]]:
    """(failed turn, its observation, the turn that corrects it) for every repair."""
    repairs = []
    for index, turn in enumerate(t.turns):
        if not turn.correction:
            continue
        if index > 0:
            failed = t.turns[index - 1]
            repairs.append((failed.text, failed.observation.text, turn.text))
        else:  # forced: the failure stands at the end of the conversation so far
            action, observation = (m["content"] for m in t.start.messages[-2:])
            repairs.append((action, observation.partition("\n")[2], turn.text))
    return repairs


def _answered(t: Trajectory) -> float:
    last = t.turns[-1].observation
    if last.status is not Status.OK:
        return 0.0
    if not t.start.expected:  # an episode
        return 0.0 if t.answer is None else answer_score(t.answer, t.start.task.answer)
    if (t.answer is not None) != _expects_answer(t.start):
        return 0.0  # a premature answer, or a call where one was due
    if last.image is not None:
        return float(last.identity == t.start.expected)
    return answer_score(last.text, t.start.expected)


def _expects_answer(start: Start) -> bool:
    return start.task.steps[start.step].call.name == "final_answer"


def verifier_scores(t: Trajectory) -> dict[str, float]:
    """The scores ``answer``, ``grounding`` and ``plan`` of a finished trajectory, in [0, 1]."""
    # Fixed wording and question. What came later may be what the evidence is about.
    known = "\n".join(m["content"] for m in t.start.messages[:2])
    grounding, plan = [], []
    for failed, observation, corrected in _failures(t):
        turn, before = _parsed(corrected), _parsed(failed)
        reflection = turn.reflection if turn else None
        if turn is None or reflection is None:
            grounding.append(0.0)
            plan.append(0.0)
            continue
        grounding.append(grounding_score(reflection.evidence, observation, known))
        plan.append(plan_score(reflection.fix_plan, before.call if before else None, turn.call))
    count = max(1, len(plan))
    return {
        "answer": _answered(t),
        "grounding": sum(grounding) / count,
        "plan": sum(plan) / count,
    }


def verifier_value(scores: dict[str, float]) -> float:
    """V of the scores."""
    return sum(WEIGHTS[name] * score for name, score in scores.items())
