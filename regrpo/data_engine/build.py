"""Executed demonstrations for supervised warm-up.

Three corpora come out of one set of tasks, so that their learners differ in what they see and in
nothing else:

- ``success``: every task solved at the first try by its reference calls (hindsight where there is a
  trap).
- ``clean``: those of them whose first try an agent could have known (no trap).
- ``rot``: a near-miss executed, its real failure, a reflection grounded in it, the correction, and
  on to the answer.

A near-miss is kept only if executing it fails, executing the correction succeeds, and the
observation tells how to get from one to the other. An endpoint as the teacher rewrites the triplets
of the failures that are kept and chosen, no others: its answers cost money.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from regrpo import provenance
from regrpo.claim import claim
from regrpo.config import DataConfig
from regrpo.data_engine.near_miss import near_misses, target_shares
from regrpo.data_engine.recording import Recording
from regrpo.data_engine.teacher import Case, Declined, GroundedTeacher, Teacher, long_winded
from regrpo.environment import Environment
from regrpo.image_files import placeholder
from regrpo.journal import Journal
from regrpo.prompts import observation_turn, opening, thought
from regrpo.records import Record, write_bytes_atomically, write_records
from regrpo.tasks import Task, task_images
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import TOOLS, VISION_TOOLS, Observation, Status
from regrpo.trajectory import Message, Start
from regrpo.workspace import file_to_dict

CHUNK = 64  # tasks that are executed between two entries of the journal
# What of the teacher may change between a build and its resumption: not what it is asked.
UNCLAIMED = (
    *("base_url", "api_key_env", "concurrency", "timeout_s", "retries", "backoff_s", "max_wait_s"),
    *("input_price", "output_price", "seed"),
)


@dataclass(frozen=True)
class Failure:
    """An executed near-miss of one step and its repair."""

    step: int
    error_type: str
    call: ToolCall
    observation: Observation
    reflection: Reflection
    by_endpoint: bool = False


@dataclass(frozen=True)
class Demonstration:
    """A task, the observations of its reference calls, and every failure that was kept."""

    task: Task
    observations: tuple[Observation, ...]
    failures: tuple[Failure, ...]

    def messages(self, failures: Sequence[Failure] = (), until: int | None = None) -> list[Message]:
        """The conversation in which exactly these failures happen, up to step ``until``."""
        return self.conversation(failures, until).messages

    def conversation(
        self, failures: Sequence[Failure] = (), until: int | None = None
    ) -> "Conversation":
        """See ``messages``; with the images that it shows."""
        by_step = {f.step: f for f in failures}
        opened = opening(self.task.question, images=self.task.num_images)
        told = Conversation(opened, list(task_images(self.task)))
        steps = list(zip(self.task.steps, self.observations, strict=True))
        for index, (step, observation) in enumerate(steps[:until]):
            failure = by_step.get(index)
            if failure is not None:
                told.fail(failure)
            told.messages.append(_act(step.call, failure.reflection if failure else None))
            if index < len(steps) - 1:
                told.observe(index, observation)
        return told

    @property
    def traps(self) -> list[Failure]:
        """The failures that the wording of the task leads to."""
        return [f for f in self.failures if self.task.steps[f.step].trap is not None]


@dataclass
class Conversation:
    """Messages, and the images that they call by number."""

    messages: list[Message]
    images: list[bytes]

    def observe(self, step: int, observation: Observation) -> None:
        """The turn that shows an observation."""
        number = None if observation.image is None else len(self.images)
        content = observation_turn(step, observation.text, number)
        self.messages.append({"role": "user", "content": content})
        self.images += [] if observation.image is None else [observation.image]

    def fail(self, failure: Failure) -> None:
        """The failed call and its observation."""
        self.messages.append(_act(failure.call))
        self.observe(failure.step, failure.observation)


@dataclass
class Corpus:
    """What ``build`` made, and what the gates dropped, by reason; ``images`` are the files that
    records name."""

    success: list[Record] = field(default_factory=list)
    clean: list[Record] = field(default_factory=list)
    rot: list[Record] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    images: dict[str, bytes] = field(default_factory=dict)


def _act(call: ToolCall, reflection: Reflection | None = None) -> Message:
    return {"role": "assistant", "content": Turn(reflection, thought(call.name), call).render()}


def demonstrate(
    environment: Environment,
    tasks: Sequence[Task],
    *,
    seed: int,
    non_commit: bool = False,
    long_share: float = 0.0,
) -> tuple[list[Demonstration], Counter[str]]:
    """Executes every reference call and every near-miss of the tasks.

    Args:
        non_commit: make near-misses of the type NonCommit as well.
        long_share: share of the reflections that are long-winded.

    Returns the demonstrations and how many near-misses each gate dropped.

    Raises:
        RuntimeError: a reference call fails: the task is wrong.
    """
    requests, plan = [], []
    for task in tasks:
        rng = random.Random(f"{seed}-{task.id}")
        tools = TOOLS if task.images is None else VISION_TOOLS
        candidates = [
            (index, error_type, call)
            for index, step in enumerate(task.steps)
            for error_type, call in near_misses(
                step, rng, non_commit=non_commit, tools=tools
            ).items()
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
        demo, failures = Demonstration(task, observations, ()), []
        for index, error_type, call in candidates:
            observation = next(results)
            if observation.status is Status.OK:
                dropped["near-miss did not fail"] += 1
                continue
            (told,) = GroundedTeacher().explain(
                [_case(demo, index, error_type, call, observation.text)]
            )
            if isinstance(told, Declined):
                dropped[told.reason] += 1
                continue
            if random.Random(f"{seed}-{task.id}-{index}-{error_type}").random() < long_share:
                told = long_winded(told, call, task.steps[index].call)
            failures.append(Failure(index, error_type, call, observation, told))
        demonstrations.append(replace(demo, failures=tuple(failures)))
    return demonstrations, dropped


def _case(demo: Demonstration, step: int, error_type: str, call: ToolCall, text: str) -> Case:
    task, seen = demo.task, tuple(o.text for o in demo.observations[:step])
    corrected = task.steps[step].call
    return Case(
        task.question,
        error_type,
        call,
        text,
        corrected,
        task.workspace,
        seen,
        looking=task.images is not None,
    )


def build(
    environment: Environment,
    tasks: Sequence[Task],
    *,
    seed: int,
    near_miss_share: float = 0.35,
    long_share: float = 0.0,
) -> Corpus:
    """Builds the three corpora in one go; see `demonstrate` and `choose`."""
    demonstrations, dropped = demonstrate(environment, tasks, seed=seed, long_share=long_share)
    chosen = choose(
        demonstrations, seed=seed, near_miss_share=near_miss_share, shares=target_shares()
    )
    return _corpus(chosen, dropped)


def choose(
    demonstrations: Sequence[Demonstration],
    *,
    seed: int,
    near_miss_share: float,
    shares: Mapping[str, float],
) -> list[tuple[Demonstration, list[Failure]]]:
    """Each demonstration with the failures that its record tells of, none without such a record.

    Args:
        near_miss_share: share of the tasks without a trap that get a forced near-miss record as
            well; its error type is the feasible one that lags furthest behind ``shares``.
    """
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    chosen = []
    for demo in demonstrations:
        failures: list[Failure] = []
        if not demo.task.trapped:
            if demo.failures and rng.random() < near_miss_share:
                total = sum(counts.values()) + 1
                failures = [
                    min(
                        demo.failures,
                        key=lambda f: counts[f.error_type] / total - shares[f.error_type],
                    )
                ]
        elif len(demo.traps) == sum(s.trap is not None for s in demo.task.steps):
            # One record tells of one failure, the last; the earlier ones stand in its context.
            failures = demo.traps
        if failures:
            counts[failures[-1].error_type] += 1
        chosen.append((demo, failures))
    return chosen


def rewrite(
    chosen: Sequence[tuple[Demonstration, list[Failure]]], teacher: Teacher, dropped: Counter[str]
) -> list[tuple[Demonstration, list[Failure]]]:
    """The same with the teacher's triplets; failures that it declines are dropped and counted."""
    cases = [
        _case(demo, f.step, f.error_type, f.call, f.observation.text)
        for demo, failures in chosen
        for f in failures
    ]
    answers = iter(teacher.explain(cases))
    rewritten = []
    for demo, failures in chosen:
        told = [(failure, next(answers)) for failure in failures]
        reasons = [answer.reason for _, answer in told if isinstance(answer, Declined)]
        dropped.update(reasons[:1])
        rewritten.append(
            (
                demo,
                [
                    replace(failure, reflection=answer, by_endpoint=True)
                    for failure, answer in told
                    if isinstance(answer, Reflection) and not reasons
                ],
            )
        )
    return rewritten


def _corpus(chosen: Sequence[tuple[Demonstration, list[Failure]]], dropped: Counter[str]) -> Corpus:
    corpus = Corpus(dropped=dropped)
    for demo, failures in chosen:
        record = _record(demo, [], None, corpus.images)
        corpus.success.append(record)
        if not demo.task.trapped:
            corpus.clean.append(record)
        if failures:
            corpus.rot.append(_record(demo, failures, failures[-1], corpus.images))
    return corpus


def _record(
    demo: Demonstration,
    failures: Sequence[Failure],
    told: Failure | None,
    files: dict[str, bytes],
) -> Record:
    """The record of a demonstration; what it shows joins ``files``, under names of the content."""
    task = demo.task
    conversation = demo.conversation(failures)
    shown: dict[str, str] = {}
    for number, data in enumerate(conversation.images):
        name = f"images/{hashlib.blake2b(data, digest_size=8).hexdigest()}.png"
        files[name], shown[placeholder(number)] = data, name
    record: Record = {
        "id": task.id if told is None else f"{task.id}_rot",
        "image": shown,
        "answer": task.answer,
        "conversations": conversation.messages,
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
    if told is not None and told.by_endpoint:
        record[provenance.KEY]["reflection"] = "teacher"
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
        told = demo.conversation([f for f in demo.traps if f.step < step], until=step)
        # Where the wording leads into a trap, the demonstration goes through it.
        repair = failure or next((f for f in demo.traps if f.step == step), None)
        if failure is not None:
            told.fail(failure)
        before = len(told.messages), len(told.images)
        if failure is None and repair is not None:
            told.fail(repair)
        right = _act(demo.task.steps[step].call, repair.reflection if repair else None)
        shown = [*told.messages[before[0] :], right]
        starts.append(
            Start(
                demo.task,
                tuple(told.messages[: before[0]]),
                step=step,
                expected=demo.observations[step].identity,
                failed=forced,
                error_type=failure.error_type if failure else None,
                demonstration=tuple(shown),
                images=tuple(told.images),
            )
        )
    return starts


def write_corpora(
    config: DataConfig, environment: Environment, progress: Progress | None = None
) -> str:
    """Builds and writes ``success.jsonl``, ``clean.jsonl`` and ``rot.jsonl``; returns a summary.

    The same configuration writes the same bytes; each file appears whole or not at all. A build
    that was killed goes on where it stopped, from a journal in the folder; the teacher's answers
    stay there, and none is paid for twice.

    Raises:
        RunError: the folder belongs to another configuration or process, or the teacher's endpoint
            does not answer: what it answered is kept.
    """
    out = Path(config.out)
    shares = target_shares(config.non_commit_share)
    with ExitStack() as stack:
        teacher = None
        if config.teacher.base_url is None:
            claim(out, _claimed(config))
        else:
            from regrpo.data_engine.openai_teacher import OpenAITeacher  # slow to import
            from regrpo.endpoint import read_key

            key = read_key("teacher.api_key_env", config.teacher.api_key_env)
            claim(out, _claimed(config))
            answers = stack.enter_context(Journal(out / "teacher.jsonl"))
            teacher = OpenAITeacher(config.teacher, key, answers, progress)
        journal = stack.enter_context(Journal(out / "executed.jsonl"))
        recording = Recording(environment, journal)
        bar = progress.add_task("execute", total=config.count) if progress else None
        demonstrations: list[Demonstration] = []
        dropped: Counter[str] = Counter()
        for first in range(0, config.count, CHUNK):
            tasks = config.tasks.generate(min(CHUNK, config.count - first), first=first)
            made, lost = demonstrate(
                recording,
                tasks,
                seed=config.tasks.seed,
                non_commit=config.non_commit_share > 0,
                long_share=config.long_share,
            )
            demonstrations += made
            dropped.update(lost)
            if progress and bar is not None:
                progress.update(bar, advance=len(tasks))
        chosen = choose(
            demonstrations,
            seed=config.tasks.seed,
            near_miss_share=config.near_miss_share,
            shares=shares,
        )
        if teacher is not None:
            chosen = rewrite(chosen, teacher, dropped)
        corpus = _corpus(chosen, dropped)
        for name, data in corpus.images.items():
            write_bytes_atomically(out / name, data)
        for name in ("success", "clean", "rot"):
            write_records(out / f"{name}.jsonl", getattr(corpus, name))
        (out / "executed.jsonl").unlink()  # only the way there; the same command makes it again
    types = Counter(r["rot_meta"]["error_type"] for r in corpus.rot)
    lines = [
        f"{out}: {len(corpus.success)} success, {len(corpus.clean)} clean, {len(corpus.rot)} rot",
        *(
            f"  {name}: {types[name] / max(1, len(corpus.rot)):.3f} (target {share:.3f})"
            for name, share in shares.items()
        ),
        *(f"  dropped {count}: {reason}" for reason, count in sorted(corpus.dropped.items())),
        *([f"  teacher: {teacher.usage}"] if teacher else []),
    ]
    return "\n".join(lines)


def _claimed(config: DataConfig) -> dict[str, Any]:
    """What the records depend on."""
    claimed = asdict(config)
    del claimed["out"]
    for name in UNCLAIMED:
        del claimed["teacher"][name]
    return claimed
