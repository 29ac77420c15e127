"""The fixed contrastive group of a state: what the offline mode trains on instead of sampling.

The official release compares five fixed candidates a state and calls some that fail a success. Here
the candidates are scripts, turns as a policy would write them, and whoever runs them learns from
the tools which succeed:

- ``one_shot``: the reference call.
- ``plain_retry``: the near-miss, and after its failure the same call again, without a reflection.
- ``recovery``: the near-miss, the teacher's reflection on what was observed, the reference call.
- ``failed_recovery``: the near-miss, a reflection that misreads the observation, another wrong
  call.
- ``long_recovery``: the recovery, with a reflection that copies the observation instead of citing
  it.
- ``bare_recovery``: the near-miss, and the reference call without a reflection.

The release's own five are all but ``long_recovery``. All but the first begin with the same failed
call, so what is learned about it is that one should not have to recover; what is learned about the
second turn comes from how the others differ.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from regrpo.data_engine.build import Demonstration, Failure
from regrpo.data_engine.teacher import explain
from regrpo.names import NAMES
from regrpo.prompts import thought
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.trajectory import Start

COPIED_CHARS = 400


@dataclass(frozen=True)
class Group:
    """A state and its candidates by name."""

    start: Start
    candidates: dict[str, tuple[Turn, ...]]


def contrastive_groups(demonstrations: Sequence[Demonstration], rng: random.Random) -> list[Group]:
    """One group from every demonstration that has a near-miss, at the step of one of them.

    Earlier steps went as they would have: through the traps of the wording, repaired.
    """
    groups = []
    for demo in demonstrations:
        if not demo.failures:
            continue
        failure = rng.choice(demo.failures)
        step = failure.step
        told = demo.conversation([f for f in demo.traps if f.step < step], until=step)
        start = Start(
            demo.task,
            tuple(told.messages),
            step=step,
            expected=demo.observations[step].identity,
            images=tuple(told.images),
        )
        groups.append(Group(start, _candidates(demo, failure, rng)))
    return groups


def _candidates(
    demo: Demonstration, failure: Failure, rng: random.Random
) -> dict[str, tuple[Turn, ...]]:
    right = demo.task.steps[failure.step].call
    wrong = wrong_repair(demo, failure, rng)
    first = _turn(failure.call)
    return {
        "one_shot": (_turn(right),),
        "plain_retry": (first, first),
        "recovery": (first, _turn(right, failure.reflection)),
        "failed_recovery": (first, _turn(wrong, _misreading(failure, wrong))),
        "long_recovery": (first, _turn(right, _long(failure))),
        "bare_recovery": (first, _turn(right)),
    }


def _turn(call: ToolCall, reflection: Reflection | None = None) -> Turn:
    return Turn(reflection, thought(call.name), call)


def wrong_repair(demo: Demonstration, failure: Failure, rng: random.Random) -> ToolCall:
    """A second call that is wrong too.

    Another name or box that the observation mentions; without one, another near-miss of the step;
    without that, the failed call again.
    """
    right = demo.task.steps[failure.step].call
    misread = _misread(failure.call, right, failure.observation.text)
    others = [f.call for f in demo.failures if f.step == failure.step and f.call != failure.call]
    return rng.choice(misread or others or [failure.call])


def _misread(failed: ToolCall, right: ToolCall, observation: str) -> list[ToolCall]:
    """The right call with what the failed one got wrong taken from elsewhere in the observation."""
    if failed.name != right.name or len(failed.args) != len(right.args):
        return []
    mentioned = observation.partition("\n")[2]  # the first line repeats the failed call
    changed = [i for i, (a, b) in enumerate(zip(failed.args, right.args, strict=True)) if a != b]
    value = right.args[changed[0]]
    if type(value) is not type(failed.args[changed[0]]):
        return []
    if isinstance(value, int):
        boxes = [
            tuple(map(int, re.findall(r"\d+", box))) for box in re.findall(r"\[.*?\]", mentioned)
        ]
        calls = [ToolCall(right.name, (*right.args[: -len(box)], *box)) for box in boxes]
    else:
        words = [w for w in value.split() if w not in failed.args[changed[0]].split()]
        names = [n for n in re.findall(r"[\w.]+", mentioned) if n.partition(".")[0] in NAMES]
        calls = [
            ToolCall(
                right.name,
                tuple(
                    value.replace(words[0], name) if i == changed[0] else argument
                    for i, argument in enumerate(right.args)
                ),
            )
            for name in dict.fromkeys(names)
            if words
        ]
    return [call for call in calls if call not in (failed, right)]


def _misreading(failure: Failure, wrong: ToolCall) -> Reflection:
    """The reflection that leads to the wrong call, as grounded as it can be."""
    text = failure.observation.text
    if wrong != failure.call:
        found = explain(failure.error_type, failure.call, text, wrong)
        if found is not None:
            return found
    first = text.strip().splitlines()[0].strip()
    return Reflection(failure.error_type, first, f"use {wrong.name}")


def _long(failure: Failure) -> Reflection:
    """The teacher's reflection with the observation copied and the failed call named."""
    right = failure.reflection
    copied = " ".join(failure.observation.text.split())[:COPIED_CHARS].strip()
    return Reflection(right.error_type, copied, f"{failure.call.render()} failed; {right.fix_plan}")
