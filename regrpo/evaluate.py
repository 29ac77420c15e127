"""Evaluation on whole held-out tasks and on forced near-misses, with 95 % confidence intervals."""

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from regrpo.config import EvalConfig, TriggerConfig
from regrpo.data_engine.build import Demonstration, demonstrate, local_starts
from regrpo.environment import Environment
from regrpo.modeling import load_image_reader, load_model, load_tokenizer
from regrpo.records import write_atomically, write_records
from regrpo.report import transcript
from regrpo.rollout import Policy, Trajectory, TurnRecord, run, same_answer, task_start
from regrpo.sampling import LocalPolicy
from regrpo.server_policy import ServerPolicy
from regrpo.tasks import FAMILIES, SERIAL_FAMILIES, VISION_FAMILIES
from regrpo.trigger import Clause


@dataclass(frozen=True)
class Rate:
    """A share of ``count`` cases, in percent, with its Wilson score interval (Wilson 1927)."""

    hits: int
    count: int

    @property
    def percent(self) -> float:
        """The share in percent; NaN of no cases."""
        return 100.0 * self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval in percent."""
        if not self.count:
            return math.nan, math.nan
        z, n = 1.959964, self.count
        p = self.hits / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # The interval holds p, also at 0 and 1, where rounding can leave it just outside.
        return 100 * max(0.0, min(p, centre - half)), 100 * min(1.0, max(p, centre + half))

    def to_dict(self) -> dict[str, Any] | None:
        """For JSON; None of no cases."""
        if not self.count:
            return None
        return {"percent": self.percent, "interval": self.interval, "count": self.count}

    def __str__(self) -> str:
        if not self.count:
            return "-"
        low, high = self.interval
        return f"{self.percent:.1f} [{low:.1f}, {high:.1f}]"


def rate(outcomes: Iterable[bool]) -> Rate:
    """The share of true outcomes."""
    values = list(outcomes)
    return Rate(sum(values), len(values))


@dataclass(frozen=True)
class FamilyReport:
    """The part of a `Report` that is told of each task family as well; its names mean the same."""

    success: Rate
    first_try: Rate
    recovery_own: Rate
    recovery_forced: Rate
    reflection_tokens: float

    def to_dict(self) -> dict[str, Any]:
        """See `Report.to_dict`."""
        return _to_dict(self)


@dataclass(frozen=True)
class Report:
    """What an agent does on held-out tasks.

    Attributes:
        success: the final answer is right.
        first_try: right, without a correction on the way.
        recovery_own: of the steps whose call failed, those where the correction observed what the
            reference call of that step observes (of the last step: the answer).
        recovery_forced: the same after an executed near-miss, from states of the reference
            trajectory.
        unneeded: turns that hold a reflection though nothing had failed, of all turns behind no
            failure.
        error_type: of the reflections after forced near-misses, those that name the error type.
        reflection_tokens: mean length of a correction's reflection; 0 without any.
        success_serial: success on the families whose repair takes several looks.
        false_fire_failure: of the steps whose first call observed what the reference call of that
            step observes, those on which the failure clause fired; `final_answer` is no such step.
        miss_failure: of the steps whose first call observed something else, those on which it did
            not: what looks ok and is not.
        false_fire_confidence: of the right steps that the failure clause let pass, those on which
            the confidence clause fired; of nothing where it is off.
        miss_confidence: of the wrong steps that the failure clause let pass, those on which neither
            fired; of nothing where the confidence clause is off.
        families: the same by task family, in the order of `regrpo.tasks.FAMILIES`, then
            `VISION_FAMILIES`.
    """

    success: Rate
    first_try: Rate
    recovery_own: Rate
    recovery_forced: Rate
    unneeded: Rate
    error_type: Rate
    reflection_tokens: float
    success_serial: Rate
    false_fire_failure: Rate
    miss_failure: Rate
    false_fire_confidence: Rate
    miss_confidence: Rate
    families: dict[str, FamilyReport]

    def to_dict(self) -> dict[str, Any]:
        """Rates as percent, 95 % interval and count; None for a rate of nothing."""
        families = {name: family.to_dict() for name, family in self.families.items()}
        return {**_to_dict(self), "families": families}

    def __str__(self) -> str:
        """A line a number, and a table of the families."""
        lines = [f"{name:21} {value}" for name, value in vars(self).items() if name != "families"]
        rows = [["family", *(f.name for f in fields(FamilyReport))]]
        for name, family in self.families.items():
            cells = (f"{x:.1f}" if isinstance(x, float) else str(x) for x in vars(family).values())
            rows.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([*lines, "", *table])


def _to_dict(report: FamilyReport | Report) -> dict[str, Any]:
    return {
        name: value.to_dict() if isinstance(value, Rate) else value
        for name, value in vars(report).items()
    }


Pair = tuple[Demonstration, Trajectory]


def _family_report(episodes: Sequence[Pair], forced: Sequence[Trajectory]) -> FamilyReport:
    """What is told of any set of tasks."""
    turns = [turn for t in [*(t for _, t in episodes), *forced] for turn in t.turns]
    tokens = [turn.reflection_tokens for turn in turns if turn.correction]
    return FamilyReport(
        success=rate(t.success for _, t in episodes),
        first_try=rate(t.success and not any(u.correction for u in t.turns) for _, t in episodes),
        recovery_own=rate(
            _as_reference(demo, turn)
            for demo, t in episodes
            for before, turn in pairwise(t.turns)
            if before.fired is Clause.FAILURE
        ),
        recovery_forced=rate(t.success for t in forced),
        reflection_tokens=sum(tokens) / len(tokens) if tokens else 0.0,
    )


def _as_reference(demo: Demonstration, turn: TurnRecord) -> bool:
    """Whether a turn observed what the reference call of its step observes."""
    if turn.step >= len(demo.observations):
        return False
    given, expected = turn.observation, demo.observations[turn.step]
    return given.status is expected.status and same_answer(given.identity, expected.identity)


def _trigger_rates(episodes: Sequence[Pair], trigger: TriggerConfig) -> dict[str, Any]:
    """False fires and misses of each clause, on the first call of every step."""
    first_calls = [
        (_as_reference(demo, turn), turn.fired)
        for demo, t in episodes
        for turn in t.turns
        # What ended an episode was nothing to reflect on any more.
        if not turn.correction and not (t.answer is not None and turn is t.turns[-1])
    ]
    passed = [
        (right, clause)
        for right, clause in first_calls
        if clause is not Clause.FAILURE and trigger.confidence_margin is not None
    ]
    rates = {}
    for name, seen in ((Clause.FAILURE, first_calls), (Clause.CONFIDENCE, passed)):
        rates[f"false_fire_{name.value}"] = rate(clause is name for right, clause in seen if right)
        rates[f"miss_{name.value}"] = rate(
            clause is not name for right, clause in seen if not right
        )
    return rates


def evaluate(
    policy: Policy,
    environment: Environment,
    demonstrations: Sequence[Demonstration],
    *,
    reflect: bool,
    seed: int = 0,
    trigger: TriggerConfig | None = None,
) -> tuple[Report, list[Trajectory]]:
    """Runs every task once as a whole episode, and one forced near-miss of each that has one."""
    trigger = TriggerConfig() if trigger is None else trigger
    episodes = run(
        policy,
        environment,
        [task_start(d.task) for d in demonstrations],
        reflect=reflect,
        whole=True,
        trigger=trigger,
    )
    rng = random.Random(seed)
    forced_from = [d for d in demonstrations if d.failures]
    starts = local_starts(forced_from, rng, forced_share=1.0)
    forced = run(policy, environment, starts, reflect=reflect, whole=False)
    pairs = list(zip(demonstrations, episodes, strict=True))
    free = [turn for t in episodes for turn in t.turns if not turn.correction]
    present = {d.task.family for d in demonstrations}
    report = Report(
        **vars(_family_report(pairs, forced)),
        **_trigger_rates(pairs, trigger),
        unneeded=rate(turn.reflection_tokens > 0 for turn in free),
        error_type=rate(
            f"ErrorType: {t.start.error_type}\n" in t.turns[-1].text for t in forced if reflect
        ),
        success_serial=rate(t.success for t in episodes if t.start.task.family in SERIAL_FAMILIES),
        families={
            family: _family_report(
                [pair for pair in pairs if pair[0].task.family == family],
                [t for t in forced if t.start.task.family == family],
            )
            for family in (*FAMILIES, *VISION_FAMILIES)
            if family in present
        },
    )
    return report, episodes


def held_out(config: EvalConfig, environment: Environment) -> list[Demonstration]:
    """The tasks of an evaluation with their executed references and near-misses."""
    return demonstrate(environment, config.tasks.generate(config.count), seed=config.seed)[0]


def load_policy(config: EvalConfig) -> Policy:
    """The model of a configuration, or that of its server, ready to act."""
    tokenizer = load_tokenizer(config.model)
    if config.rollout.backend == "server":
        return ServerPolicy(
            config.rollout,
            tokenizer,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
    return LocalPolicy(
        load_model(config.model).eval(),
        tokenizer,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        cache_gib=config.rollout.cache_gib,
        reader=load_image_reader(config.model, tokenizer),
    )


def evaluate_model(config: EvalConfig, environment: Environment) -> tuple[Report, list[Trajectory]]:
    """Loads and evaluates a model on the held-out tasks of a configuration."""
    policy = load_policy(config)
    demonstrations = held_out(config, environment)
    return evaluate(
        policy,
        environment,
        demonstrations,
        reflect=config.reflect,
        seed=config.seed,
        trigger=config.trigger,
    )


def run_eval(config: EvalConfig, environment: Environment) -> str:
    """Evaluates a model, writes report.json and transcripts.jsonl; returns the report as text."""
    report, episodes = evaluate_model(config, environment)
    if config.out is not None:
        out = Path(config.out)
        write_atomically(out / "report.json", json.dumps(report.to_dict(), indent=2) + "\n")
        write_records(out / "transcripts.jsonl", (transcript(t) for t in episodes))
    return str(report)
