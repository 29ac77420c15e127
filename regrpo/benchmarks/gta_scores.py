"""GTA's measures, from what a model did. Every value is in percent, or None where nothing counts.

Step by step, the model continues every reference prefix by one turn:

- InstAcc: the turn is a call where one was due, an answer where one was, and it can be executed.
- ToolAcc, ArgAcc: the tool's name is right; so are its arguments. Over the reference calls.
- SummAcc: the score of the answer. Over the tasks that the scorer judges.

End to end, the model works alone:

- AnsAcc: the score of the answer. Over the tasks that the scorer judges.
- P, O, L, C: F1 of the tools called, by category. ToolAcc: the share of the reference calls whose
  tool was called. CodeExec: the share of the turns that could be executed and did not fail.

What differs between scorers beside the answers (`regrpo.benchmarks.answers`):

- InstAcc: ``official`` counts answers without references as hits but not in the total, so that
  the reference dialogs themselves get more than 100. ``fixed`` and ``mat`` count every step.
- ArgAcc: ``official`` compares the arguments as written; the others with defaults filled in.
- F1: ``official`` counts a reference call as met if its tool is called at all, so that one call
  may meet many and precision passes 1. The others match calls one to one, a task at a time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrpo.benchmarks.answers import Similarity, answer_score
from regrpo.benchmarks.gta import GtaTask
from regrpo.tool_calls import ToolCall
from regrpo.tools.gta.specs import CATEGORIES, GTA_TOOLS

Scores = dict[str, float | None]
_EPS = 1e-5  # of the official F1


@dataclass(frozen=True)
class StepPrediction:
    """What a model did at a step: a call, an answer, or, with ``error``, nothing of use."""

    call: ToolCall | None = None
    answer: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class EndPrediction:
    """An episode: names of the tools called, turns and how many of them failed, the answer."""

    tools: tuple[str, ...] = ()
    turns: int = 0
    failed: int = 0
    answer: str | None = None


def step_scores(
    scorer: str,
    tasks: Sequence[GtaTask],
    predictions: Mapping[str, Sequence[StepPrediction]],
    similarity: Similarity | None = None,
) -> Scores:
    """The step-by-step measures; a task without predictions counts as failed."""
    aligned = calls = names = arguments = steps = 0
    answers: list[float | None] = []
    for task in tasks:
        missing = [StepPrediction(error="missing")] * (len(task.steps) + 1)
        made = [*predictions.get(task.id, ()), *missing]
        for step, prediction in zip(task.steps, made, strict=False):
            calls += 1
            aligned += prediction.call is not None and prediction.error is None
            if prediction.call is not None and prediction.call.name == step.call.name:
                names += 1
                arguments += _same_arguments(scorer, prediction.call, step.call)
        steps += len(task.steps)
        if task.answer is not None:
            prediction = made[len(task.steps)]
            aligned += prediction.answer is not None and prediction.error is None
            steps += 1
            answers.append(
                answer_score(scorer, prediction.answer or "", task.references, similarity)
            )
    judged = [score for score in answers if score is not None]
    if scorer == "official":
        steps = calls + sum(bool(t.references) for t in tasks if t.answer is not None)
    return {
        "InstAcc": _percent(aligned, steps),
        "ToolAcc": _percent(names, calls),
        "ArgAcc": _percent(arguments, calls),
        "SummAcc": _percent(sum(judged), len(judged)),
    }


def _same_arguments(scorer: str, given: ToolCall, expected: ToolCall) -> bool:
    tool = GTA_TOOLS[expected.name]
    try:
        if scorer == "official":
            return tool.bind(given, defaults=False) == expected.kwargs
        return tool.bind(given) == tool.bind(expected)
    except TypeError:
        return False


def end_scores(
    scorer: str,
    tasks: Sequence[GtaTask],
    predictions: Mapping[str, EndPrediction],
    similarity: Similarity | None = None,
) -> Scores:
    """The end-to-end measures; a task without a prediction counts as failed."""
    pairs = [(task, predictions.get(task.id, EndPrediction())) for task in tasks]
    answers = [
        answer_score(scorer, made.answer or "", task.references, similarity) for task, made in pairs
    ]
    judged = [score for score in answers if score is not None]
    scores: Scores = {"AnsAcc": _percent(sum(judged), len(judged))}
    for category in CATEGORIES:
        met = called = wanted = 0
        for task, made in pairs:
            given = _of(category, made.tools)
            expected = _of(category, (step.call.name for step in task.steps))
            called += given.total()
            wanted += expected.total()
            both = expected & given
            if scorer == "official":
                met += sum(count for name, count in expected.items() if name in given)
            else:
                met += both.total()
        scores[category[0].upper()] = _f1(scorer, met, called, wanted)
    every = [
        (Counter(step.call.name for step in task.steps), Counter(made.tools))
        for task, made in pairs
    ]
    wanted = sum(expected.total() for expected, _ in every)
    scores["ToolAcc"] = _percent(sum((e & g).total() for e, g in every), wanted)
    turns = sum(made.turns for _, made in pairs)
    scores["CodeExec"] = _percent(turns - sum(made.failed for _, made in pairs), turns)
    return scores


def _of(category: str, names: Iterable[str]) -> Counter[str]:
    return Counter(n for n in names if n in GTA_TOOLS and GTA_TOOLS[n].category == category)


def _f1(scorer: str, met: int, called: int, wanted: int) -> float | None:
    if not wanted:
        return None
    if scorer == "official":
        precision, recall = met / (called + _EPS), met / wanted
        return 100 * 2 * precision * recall / (precision + recall + _EPS)
    return 100 * 2 * met / (called + wanted)


def _percent(hits: float, count: int) -> float | None:
    return 100 * hits / count if count else None


def judged_counts(
    scorer: str, tasks: Sequence[GtaTask], similarity: Similarity | None
) -> dict[str, Any]:
    """How many tasks the answer score is over, and how many it leaves out."""
    scores = [answer_score(scorer, "", task.references, similarity) for task in tasks]
    judged = sum(score is not None for score in scores)
    unjudged = sum(
        score is None and bool(task.references) for score, task in zip(scores, tasks, strict=True)
    )
    return {"answers_judged": judged, "answers_with_references_not_judged": unjudged}


def oracle(
    tasks: Sequence[GtaTask],
) -> tuple[dict[str, list[StepPrediction]], dict[str, EndPrediction]]:
    """The reference dialogs themselves as predictions, in both modes."""
    steps, ends = {}, {}
    for task in tasks:
        made = [StepPrediction(call=step.call) for step in task.steps]
        if task.answer is not None:
            made.append(StepPrediction(answer=task.answer))
        steps[task.id] = made
        names = tuple(step.call.name for step in task.steps)
        ends[task.id] = EndPrediction(names, len(made), 0, task.answer)
    return steps, ends
