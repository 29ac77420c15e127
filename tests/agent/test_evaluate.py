"""Evaluation with policies whose scores are known, and its intervals."""

import json
import math
import re
from dataclasses import replace

import pytest

from regrpo.config import EvalConfig, TaskConfig, TriggerConfig
from regrpo.data_engine.build import demonstrate
from regrpo.evaluate import Rate, evaluate, rate, run_eval
from regrpo.prompts import REFLECTION_OPENER
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat
from regrpo.tasks import FAMILIES, SERIAL_FAMILIES, VISION_FAMILIES, generate_tasks
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.vision_tasks import GRID


class Oracle:
    """Acts from the task's reference: walks into its traps, then repairs as it is told to.

    Args:
        repair: "right", "wrong" (fails again), "other" (works, but is not what was asked), "last"
            (what the last step of the reference calls) or "word" (crops another text of the page).
        needless: writes a reflection on every turn.
    """

    def __init__(self, tokenizer, demonstrations, *, repair="right", needless=False):
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        self.demonstrations = demonstrations
        self.repair = repair
        self.needless = needless

    def session(self):
        return self

    def generate(self, prompts, numbers):
        return [self.turn(self.tokenizer.decode(p)) for p in prompts]

    def turn(self, text):
        (demo,) = (d for d in self.demonstrations if f"Task: {d.task.question}<|end|>" in text)
        turns = text.split("<|assistant|>")[1:]
        failed = turns[-1].startswith(REFLECTION_OPENER) or self.retries(turns)
        step = len(set(re.findall(r"OUTPUT OF STEP (\d+)", text))) - failed
        reference = demo.task.steps[step]
        reflection = Reflection("ArgInvalid", "x", "y")
        if not failed:
            call = reference.trap or reference.call
            text = Turn(reflection if self.needless else None, "?", call).render()
        else:
            call = {
                "right": reference.call,
                "wrong": ToolCall("read_file", ("nothing.txt",)),
                "other": ToolCall("calculator", ("1 + 1",)),
                "last": demo.task.steps[-1].call,
                "word": _crop_of_a_word(demo.task) if self.repair == "word" else None,
            }[self.repair]
            text = Turn(reflection, "?", call).render()
            if turns[-1].startswith(REFLECTION_OPENER):
                text = text.removeprefix(REFLECTION_OPENER)
            else:
                text = Turn(None, "?", call).render()
        ids = [*self.chat.encode(text), self.chat.end_id]
        return Sample(ids, [-1.0] * len(ids))

    @staticmethod
    def retries(turns):
        """Without an opener, a failure shows in the observation."""
        marks = r"Error: |\(empty region\)|no results|\(no rows\)"
        return len(turns) > 1 and bool(re.search(marks, turns[-2]))


def _crop_of_a_word(task):
    (page,) = task.workspace
    x, y = next((x, y) for x, y, text in page.lines if text != task.answer)
    return ToolCall("crop", (page.path, x, y - 1, x + 2 * GRID, y - 1 + GRID))


@pytest.fixture(scope="module")
def held_out(environment):
    tasks = generate_tasks(96, seed=77, hops=(1, 3))
    asked_once = {t.question: t for t in tasks}  # the oracle knows a task by its question
    return demonstrate(environment, list(asked_once.values()), seed=0)[0]


def share(values):
    values = list(values)
    return 100 * sum(values) / len(values)


@pytest.mark.parametrize("reflect", [True, False])
def test_an_oracle_recovers_from_everything(tokenizer, environment, held_out, reflect):
    policy = Oracle(tokenizer, held_out)
    report, episodes = evaluate(policy, environment, held_out, reflect=reflect)
    assert [e.start.task for e in episodes] == [d.task for d in held_out]
    assert report.success == Rate(len(held_out), len(held_out))
    assert report.success_serial.percent == 100
    assert report.success_serial.count == sum(d.task.family in SERIAL_FAMILIES for d in held_out)
    assert report.first_try.percent == share(not d.task.trapped for d in held_out)
    traps = sum(step.trap is not None for d in held_out for step in d.task.steps)
    assert report.recovery_own == Rate(traps, traps)
    assert report.recovery_forced.percent == 100
    assert report.recovery_forced.count == sum(bool(d.failures) for d in held_out)
    assert report.unneeded.hits == 0
    if reflect:
        rest = Reflection("ArgInvalid", "x", "y").render().removeprefix(REFLECTION_OPENER)
        assert report.reflection_tokens == len(policy.chat.encode(rest))
        assert 0 < report.error_type.percent < 100  # always says ArgInvalid
        assert report.error_type.count == report.recovery_forced.count
    else:
        assert report.reflection_tokens == 0
        assert report.error_type.count == 0


class Unsure(Oracle):
    """Reads something else at the second step of every third task, and is unsure now and then."""

    def turn(self, text):
        sample = super().turn(text)
        index, demo = next(
            (i, d)
            for i, d in enumerate(self.demonstrations)
            if f"Task: {d.task.question}<|end|>" in text
        )
        step = len(set(re.findall(r"OUTPUT OF STEP (\d+)", text)))
        again = text.count("OUTPUT OF STEP 1]") or text.count("OUTPUT OF STEP 0]") > 1
        if step != 1 or again or len(demo.task.steps) < 3 or demo.task.trapped:
            return sample
        if index % 3 == 0:
            call = Turn(None, "?", ToolCall("calculator", ("1 + 1",))).render()
            sample = Sample([*self.chat.encode(call), self.chat.end_id], [])
        log_prob = -3.0 if index % 2 else -1.0
        return Sample(sample.ids, [log_prob] * len(sample.ids))


@pytest.mark.parametrize("on", [False, True])
def test_false_fires_and_misses_of_each_clause(tokenizer, environment, on):
    tasks = generate_tasks(48, seed=5, trap_share=0.2, families=("label", "lookup", "sum", "see"))
    demos = demonstrate(environment, list({t.question: t for t in tasks}.values()), seed=0)[0]
    trigger = TriggerConfig(confidence_margin=0.1 if on else None)
    policy = Unsure(tokenizer, demos)
    report, episodes = evaluate(policy, environment, demos, reflect=True, trigger=trigger)
    odd = [i for i, d in enumerate(demos) if len(d.task.steps) >= 3 and not d.task.trapped]
    wrong, unsure = {i for i in odd if i % 3 == 0}, {i for i in odd if i % 2}
    assert len(wrong & unsure) > 0
    assert len(wrong - unsure) > 0
    assert len(unsure - wrong) > 0
    traps = sum(step.trap is not None for d in demos for step in d.task.steps)
    calls = sum(len(d.task.steps) - 1 for d in demos)
    right = calls - traps - len(wrong)
    assert report.false_fire_failure == Rate(0, right)
    assert report.miss_failure == Rate(len(wrong), len(wrong) + traps)
    if on:
        assert report.false_fire_confidence == Rate(len(unsure - wrong), right)
        assert report.miss_confidence == Rate(len(wrong - unsure), len(wrong))
        assert sum(t.reflection_tokens > 0 for t in episodes) > len(unsure)
    else:
        assert report.false_fire_confidence == report.miss_confidence == Rate(0, 0)
    # A correction of what had worked is none of a failure.
    assert report.recovery_own == Rate(traps, traps)


def test_families_are_reported_apart(tokenizer, environment, held_out):
    """An oracle whose repairs go wrong, but for one family."""

    class Specialist(Oracle):
        def turn(self, text):
            family = next(
                d.task.family for d in held_out if f"Task: {d.task.question}<|end|>" in text
            )
            self.repair = "right" if family == "links" else "wrong"
            return super().turn(text)

    report, episodes = evaluate(
        Specialist(tokenizer, held_out), environment, held_out, reflect=True
    )
    assert list(report.families) == list(FAMILIES)
    assert report.families["links"].recovery_own.percent == 100
    assert report.families["links"].recovery_forced.percent == 100
    for name, family in report.families.items():
        own = [(d, e) for d, e in zip(held_out, episodes, strict=True) if d.task.family == name]
        assert family.success == rate(e.success for _, e in own)
        assert family.first_try.percent == share(not d.task.trapped for d, _ in own)
        if name != "links":
            assert family.recovery_own.hits == family.recovery_forced.hits == 0
            assert family.recovery_own.count > 0
    for name in ("success", "first_try", "recovery_own", "recovery_forced"):
        parts = [getattr(family, name) for family in report.families.values()]
        hits, count = sum(p.hits for p in parts), sum(p.count for p in parts)
        assert getattr(report, name) == Rate(hits, count)
    assert report.families["links"].reflection_tokens == report.reflection_tokens > 0
    told = json.loads(json.dumps(report.to_dict()))["families"]["links"]
    assert told["success"]["count"] == report.families["links"].success.count
    assert set(told) == set(vars(report.families["links"]))


@pytest.mark.parametrize("repair", ["wrong", "other"])
def test_repairs_that_do_not_repair(tokenizer, environment, held_out, repair):
    policy = Oracle(tokenizer, held_out, repair=repair)
    report, episodes = evaluate(policy, environment, held_out, reflect=True)
    assert report.recovery_own.hits == 0
    assert report.recovery_forced.hits == 0
    assert report.first_try.percent == share(not d.task.trapped for d in held_out)
    if repair == "wrong":
        assert report.success == report.first_try
        assert all(len(e.turns) >= 2 for e in episodes)
        # A correction that fails is the end.
        assert all(e.success or e.turns[-1].correction for e in episodes)


def test_what_another_step_observes_is_no_recovery(tokenizer, environment, held_out):
    policy = Oracle(tokenizer, held_out, repair="last")
    report, episodes = evaluate(policy, environment, held_out, reflect=True)
    assert report.success.percent == 100  # the answer, out of nowhere
    same = [
        demo.observations[turn.step].text == demo.task.answer
        for demo, episode in zip(held_out, episodes, strict=True)
        for turn in episode.turns
        if turn.correction
    ]
    assert report.recovery_own == rate(same)
    assert report.recovery_own.percent < 20


@pytest.mark.parametrize(("repair", "percent"), [("right", 100), ("word", 0)])
def test_a_crop_of_something_else_is_no_recovery(tokenizer, environment, repair, percent):
    """All crops that work have the same text: what they show tells them apart."""
    tasks = generate_tasks(60, seed=77, families=VISION_FAMILIES)
    asked_once = list({t.question: t for t in tasks}.values())
    # The oracle reads text alone; forced near-misses would show it pages.
    demonstrations = [
        replace(d, failures=()) for d in demonstrate(environment, asked_once, seed=0)[0]
    ]
    policy = Oracle(tokenizer, demonstrations, repair=repair)
    report, _ = evaluate(policy, environment, demonstrations, reflect=True)
    assert report.recovery_own.percent == percent
    assert report.recovery_own.count == sum(t.trapped for t in asked_once) > 3
    assert report.families["scan"].recovery_own == report.recovery_own


def test_needless_reflections_are_counted(tokenizer, environment, held_out):
    policy = Oracle(tokenizer, held_out, needless=True)
    report, episodes = evaluate(policy, environment, held_out, reflect=True)
    assert report.unneeded.percent == 100
    free = sum(not turn.correction for e in episodes for turn in e.turns)
    assert report.unneeded.count == free
    assert report.success.percent == 100


def test_the_forced_near_misses_are_a_function_of_the_seed(tokenizer, environment, held_out):
    policy = Oracle(tokenizer, held_out)
    reports = [
        evaluate(policy, environment, held_out, reflect=True, seed=seed)[0] for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Wilson (1927), worked by hand from the quadratic in p.
    [(0, 10, 0.0, 27.753), (10, 10, 72.247, 100.0), (50, 100, 40.383, 59.617)],
)
def test_wilson_interval(hits, count, low, high):
    interval = Rate(hits, count).interval
    assert interval == pytest.approx((low, high), abs=0.001)
    assert str(Rate(hits, count)) == f"{100 * hits / count:.1f} [{low:.1f}, {high:.1f}]"


def test_a_rate_of_nothing():
    nothing = rate([])
    assert math.isnan(nothing.percent)
    assert str(nothing) == "-"
    assert rate([True, False, True]) == Rate(2, 3)


def test_run_eval_writes_a_report_and_transcripts(model, tokenizer, environment, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = EvalConfig(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "out"),
        count=8,
        tasks=TaskConfig(seed=3, families=("layout", "formats")),
        max_new_tokens=4,
    )
    text = run_eval(config, environment)
    for name in ("success", "first_try", "recovery_own", "recovery_forced", "unneeded"):
        assert re.search(rf"^{name} ", text, re.MULTILINE)
    raw = (tmp_path / "out" / "report.json").read_text()
    assert "NaN" not in raw
    report = json.loads(raw)
    assert report["success"]["count"] == 8
    assert report["success_serial"] is None  # no such task among them
    assert list(report["families"]) == ["formats", "layout"]
    assert re.search(r"^family +success +first_try ", text, re.MULTILINE)
    assert re.search(r"^layout +0\.0 \[", text, re.MULTILINE)
    lines = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").open()]
    assert len(lines) == 8
    assert all(line["turns"][0]["status"] == "error" for line in lines)
    assert run_eval(config, environment) == text
