"""Executed demonstrations for supervised warm-up.

Three corpora come out of one set of tasks, so that their learners differ in what they see and in
nothing else:

- ``success``: every task solved at the first try by its reference calls (hindsight where there is a
  trap).
- ``clean``: those of them whose first try an agent could have known (no trap).
- ``rot``: a near-miss executed, its real failure, a reflection grounded in it, the correction, and
  on to the answer.

A near-miss is kept only if executing it fails, executing the correction succeeds, and the
observation tells how to get from one to the other.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrpo import provenance
from regrpo.config import DataConfig
from regrpo.data_engine.near_miss import ERROR_SHARES, near_misses
from regrpo.data_engine.teacher import explain, long_winded
from regrpo.environment import Environment
from regrpo.prompts import observation_turn, opening, thought
from regrpo.records import Record, write_records
from regrpo.tasks import Task
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import Observation, Status
from regrpo.trajectory import Message, Start
from regrpo.workspace import file_to_dict


@dataclass(frozen=True)
class Failure:
    """An executed near-miss of one step and its repair."""

    step: int
    error_type: str
    call: ToolCall
    observation: Observation
    reflection: Reflection


@dataclass(frozen=True)
class Demonstration:
    """A task, the observations of its reference calls, and every failure that was kept."""

    task: Task
    observations: tuple[Observation, ...]
    failures: tuple[Failure, ...]

    def messages(self, failures: Sequence[Failure] = (), until: int | None = None) -> list[Message]:
        """The conversation in which exactly these failures happen, up to step ``until``."""
        by_step = {f.step: f for f in failures}
        messages = opening(self.task.question)
        steps = list(zip(self.task.steps, self.observations, strict=True))
        for index, (step, observation) in enumerate(steps[:until]):
            failure = by_step.get(index)
            if failure is not None:
                messages += failed_turns(failure)
            reflection = failure.reflection if failure else None
            messages.append(_act(step.call, reflection))
            if index < len(steps) - 1:
                messages.append(_observe(index, observation))
        return messages

    @property
    def traps(self) -> list[Failure]:
        """The failures that the wording of the task leads to."""
        return [f for f in self.failures if self.task.steps[f.step].trap is not None]


@dataclass
class Corpus:
    """What ``build`` made, and what the gates dropped, by reason."""

    success: list[Record] = field(default_factory=list)
    clean: list[Record] = field(default_factory=list)
    rot: list[Record] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def _act(call: ToolCall, reflection: Reflection | None = None) -> Message:
    return {"role": "assistant", "content": Turn(reflection, thought(call.name), call).render()}


def _observe(step: int, observation: Observation) -> Message:
    return {"role": "user", "content": observation_turn(step, observation.text)}


def failed_turns(failure: Failure) -> list[Message]:
    """The failed call and its observation."""
    return [_act(failure.call), _observe(failure.step, failure.observation)]


def demonstrate(
    environment: Environment, tasks: Sequence[Task], *, seed: int, long_share: float = 0.0
) -> tuple[list[Demonstration], Counter[str]]:
    """Executes every reference call and every near-miss of the tasks.

    Args:
        long_share: share of the reflections that are long-winded.

    Returns the demonstrations and how many near-misses each gate dropped.

    Raises:
        RuntimeError: a reference call fails: the task is wrong.
    """
    requests, plan = [], []
    for task in tasks:
        rng = random.Random(f"{seed}-{task.id}")
        candidates = [
            (index, error_type, call)
            for index, step in enumerate(task.steps)
            for error_type, call in near_misses(step, rng).items()
        ]
        plan.append(candidates)
        calls = [*(s.call for s in task.steps), *(call for _, _, call in candidates)]
        requests += [(task.workspace, str(_act(call)["content"])) for call in calls]
    results = iter(environment.execute(requests))
    demonstrations, dropped = [], Counter[str]()
    for task, candidates in zip(tasks, plan, strict=True):
        observations = tuple(next(results) for _ in task.steps)
        for step, observation in zip(task.steps, observations, strict=True):
            if observation.status is not Status.OK:
                raise RuntimeError(
                    f"task {task.id}: reference call {step.call.render()} gave {observation.text!r}"
                )
        failures = []
        for index, error_type, call in candidates:
            observation = next(results)
            if observation.status is Status.OK:
                dropped["near-miss did not fail"] += 1
                continue
            reflection = explain(error_type, call, observation.text, task.steps[index].call)
            if reflection is None:
                dropped["repair not in the observation"] += 1
                continue
            if random.Random(f"{seed}-{task.id}-{index}-{error_type}").random() < long_share:
                reflection = long_winded(reflection, call, task.steps[index].call)
            failures.append(Failure(index, error_type, call, observation, reflection))
        demonstrations.append(Demonstration(task, observations, tuple(failures)))
    return demonstrations, dropped


def build(
    environment: Environment,
    tasks: Sequence[Task],
    *,
    seed: int,
    near_miss_share: float = 0.35,
    long_share: float = 0.0,
) -> Corpus:
    """Builds the three corpora.

    Args:
        near_miss_share: share of the tasks without a trap that get a forced near-miss record as
            well; its error type is the feasible one that lags furthest behind ``ERROR_SHARES``.
        long_share: share of the reflections that are long-winded.
    """
    demonstrations, dropped = demonstrate(environment, tasks, seed=seed, long_share=long_share)
    corpus = Corpus(dropped=dropped)
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    for demo in demonstrations:
        traps = demo.traps
        record = _record(demo, [], None)
        corpus.success.append(record)
        if not demo.task.trapped:
            corpus.clean.append(record)
            if demo.failures and rng.random() < near_miss_share:
                total = sum(counts.values()) + 1
                chosen = min(
                    demo.failures,
                    key=lambda f: counts[f.error_type] / total - ERROR_SHARES[f.error_type],
                )
                counts[chosen.error_type] += 1
                corpus.rot.append(_record(demo, [chosen], chosen))
        elif len(traps) == sum(s.trap is not None for s in demo.task.steps):
            # One record tells of one failure, the last; the earlier ones stand in its context.
            counts[traps[-1].error_type] += 1
            corpus.rot.append(_record(demo, traps, traps[-1]))
    return corpus


def _record(demo: Demonstration, failures: Sequence[Failure], told: Failure | None) -> Record:
    task = demo.task
    record: Record = {
        "id": task.id if told is None else f"{task.id}_rot",
        "image": {},
        "answer": task.answer,
        "conversations": demo.messages(failures),
    }
    if told is not None:
        call = task.steps[told.step].call
        record["rot_meta"] = {
            "src_id": task.id,
            "step_index": told.step,
            "error_type": told.error_type,
            "failed_action": _act(told.call)["content"],
            "failed_observation": told.observation.text,
            "reflection": {
                "error_type": told.reflection.error_type,
                "evidence": told.reflection.evidence,
                "fix_plan": told.reflection.fix_plan,
            },
            "corrected_action": _act(call)["content"],
            "final_answer": task.answer,
        }
    record[provenance.KEY] = _origin(task, failed=told is not None)
    return record


def _origin(task: Task, *, failed: bool) -> dict[str, Any]:
    """That everything was executed, and on which files, so that anyone can execute it again."""
    origin: dict[str, Any] = {"provenance": "executed"}
    if failed:
        origin["failure"] = "executed"
    if isinstance(task.workspace, tuple):
        files = [file_to_dict(file) for file in task.workspace]
        origin["workspace"] = json.loads(json.dumps(files))  # lists, as they are read back
    return origin


def local_starts(
    demonstrations: Sequence[Demonstration], rng: random.Random, *, forced_share: float
) -> list[Start]:
    """One state for a local trajectory from every demonstration.

    With probability ``forced_share`` a near-miss has been executed already and the next turn must
    repair it. Otherwise it is any step. Earlier steps went as they would have: through the traps of
    the wording, repaired.
    """
    starts = []
    for demo in demonstrations:
        forced = bool(demo.failures) and rng.random() < forced_share
        failure = rng.choice(demo.failures) if forced else None
        step = rng.randrange(len(demo.task.steps)) if failure is None else failure.step
        messages = demo.messages([f for f in demo.traps if f.step < step], until=step)
        shown: list[Message] = []
        # Where the wording leads into a trap, the demonstration goes through it.
        repair = failure or next((f for f in demo.traps if f.step == step), None)
        if failure is not None:
            messages += failed_turns(failure)
        elif repair is not None:
            shown = failed_turns(repair)
        shown.append(_act(demo.task.steps[step].call, repair.reflection if repair else None))
        starts.append(
            Start(
                demo.task,
                tuple(messages),
                step=step,
                expected=demo.observations[step].text,
                failed=forced,
                error_type=failure.error_type if failure else None,
                demonstration=tuple(shown),
            )
        )
    return starts


def write_corpora(config: DataConfig, environment: Environment) -> str:
    """Builds and writes ``success.jsonl``, ``clean.jsonl`` and ``rot.jsonl``; returns a summary.

    The same configuration writes the same bytes; each file appears whole or not at all.
    """
    tasks = config.tasks
    corpus = build(
        environment,
        tasks.generate(config.count),
        seed=tasks.seed,
        near_miss_share=config.near_miss_share,
        long_share=config.long_share,
    )
    out = Path(config.out)
    for name in ("success", "clean", "rot"):
        write_records(out / f"{name}.jsonl", getattr(corpus, name))
    types = Counter(r["rot_meta"]["error_type"] for r in corpus.rot)
    lines = [
        f"{out}: {len(corpus.success)} success, {len(corpus.clean)} clean, {len(corpus.rot)} rot",
        *(
            f"  {name}: {types[name] / max(1, len(corpus.rot)):.3f} (target {share:.3f})"
            for name, share in ERROR_SHARES.items()
        ),
        *(f"  dropped {count}: {reason}" for reason, count in sorted(corpus.dropped.items())),
    ]
    return "\n".join(lines)
