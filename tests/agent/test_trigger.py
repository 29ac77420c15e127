"""The trigger: its rule, what it makes of a rollout, and what it knows of steps taken before."""

import math

import pytest
import torch
from runs import metrics_of, rl_config

from regrpo.confidence import first_calls, with_confidences
from regrpo.config import EvalConfig, TrainConfig, TriggerConfig
from regrpo.prompts import REFLECTION_OPENER, observation_turn, opening, step_of
from regrpo.report import transcript
from regrpo.rl import run_rl
from regrpo.rollout import run, task_start
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat
from regrpo.tasks import Step, Task
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import Status
from regrpo.trajectory import Start
from regrpo.trigger import Clause, confidence, fired
from regrpo.workspace import TextFile
from regrpo_kernels import Segment

OFF, ON = TriggerConfig(), TriggerConfig(confidence_margin=0.0)


def test_confidence_is_the_geometric_mean_of_probabilities():
    assert confidence([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert confidence([0.0]) == 1.0
    assert confidence([-800.0]) == 0.0
    assert confidence([]) is None


RULES = [
    (Status.ERROR, 0.9, [], OFF, Clause.FAILURE),
    (Status.EMPTY, 0.9, [], OFF, Clause.FAILURE),
    (Status.ERROR, None, [0.9], ON, Clause.FAILURE),
    (Status.OK, 0.1, [0.9], OFF, None),
    (Status.OK, 0.59, [0.9, 0.3], ON, Clause.CONFIDENCE),  # kappa is the mean, 0.6
    (Status.OK, 0.6, [0.9, 0.3], ON, None),
    (Status.OK, 0.1, [], ON, None),  # i > 1
    (Status.OK, None, [0.9], ON, None),
    (Status.OK, 0.51, [0.6], TriggerConfig(confidence_margin=0.1), None),
    (Status.OK, 0.49, [0.6], TriggerConfig(confidence_margin=0.1), Clause.CONFIDENCE),
]


@pytest.mark.parametrize(("status", "certainty", "earlier", "config", "expected"), RULES)
def test_the_rule(status, certainty, earlier, config, expected):
    assert fired(status, certainty, earlier, config) is expected


def test_configurations():
    for margin in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"trigger.confidence_margin: got .* 0 or more"):
            TriggerConfig(confidence_margin=margin)
    for make in (TrainConfig, EvalConfig):
        with pytest.raises(ValueError, match="expected null where reflect is false"):
            make(model="m", out="o", reflect=False, trigger=ON)


# Rollouts.

TASK = Task(
    "t",
    "sum",
    "?",
    "7",
    (TextFile("a.txt", "7"), TextFile("b.txt", "8")),
    tuple(
        Step(ToolCall(name, (value,)))
        for name, value in (("read_file", "a.txt"), ("read_file", "b.txt"), ("final_answer", "7"))
    ),
)
REFLECTION = Reflection("ArgInvalid", "a", "b")
REST = REFLECTION.render().removeprefix(REFLECTION_OPENER)


def act(argument, p, *, tool="read_file", reflection="", of_reflection=0.5):
    """A turn whose action tokens have probability ``p``."""
    return reflection, Turn(None, "?", ToolCall(tool, (argument,))).render(), of_reflection, p


def answer(p):
    return act("7", p, tool="final_answer")


class Scripted:
    def __init__(self, tokenizer, script):
        self.chat = ChatFormat(tokenizer)
        self.script = list(script)
        self.prompts = []

    def session(self):
        return self

    def generate(self, prompts, numbers):
        self.prompts += [self.chat.tokenizer.decode(p) for p in prompts]
        reflection, turn, of_reflection, p = self.script.pop(0)
        first, rest = self.chat.encode(reflection), self.chat.encode(turn)
        log_probs = [math.log(of_reflection)] * len(first) + [math.log(p)] * (len(rest) + 1)
        return [Sample([*first, *rest, self.chat.end_id], log_probs)]


def roll(tokenizer, environment, script, *, start=None, whole=True, trigger=ON):
    policy = Scripted(tokenizer, script)
    (t,) = run(
        policy,
        environment,
        [start or task_start(TASK)],
        reflect=True,
        whole=whole,
        trigger=trigger,
        max_steps=4,
    )
    assert not policy.script, "the trajectory ended too early"
    return t, policy.prompts


def test_a_doubted_call_is_reflected_on_and_corrected(tokenizer, environment):
    script = [act("a.txt", 0.9), act("a.txt", 0.5), act("b.txt", 0.5, reflection=REST), answer(0.9)]
    t, prompts = roll(tokenizer, environment, script)
    assert t.success
    assert [u.step for u in t.turns] == [0, 1, 1, 2]
    assert [u.correction for u in t.turns] == [False, False, True, False]
    assert [u.fired for u in t.turns] == [None, Clause.CONFIDENCE, None, None]
    assert [u.confidence for u in t.turns] == pytest.approx([0.9, 0.5, 0.5, 0.9])
    assert t.confidences == pytest.approx([0.9, 0.5, 0.9])
    # It sees what it doubts, and the opener; later both calls and both observations.
    assert prompts[2].endswith(f"{observation_turn(1, '7')}<|end|><|assistant|>{REFLECTION_OPENER}")
    assert observation_turn(1, "7") in prompts[3]
    assert observation_turn(1, "8") in prompts[3]
    assert not prompts[3].endswith(REFLECTION_OPENER)
    assert t.turns[2].text.startswith(REFLECTION_OPENER)
    assert t.reflection_tokens == t.turns[2].reflection_tokens > 0
    # The opener is the trigger's, not the policy's.
    opener = ChatFormat(tokenizer).encode(REFLECTION_OPENER)
    at = t.tokens.segment_ids.index(Segment.REFLECTION)
    assert t.tokens.input_ids[at - len(opener) : at] == opener
    assert set(t.tokens.segment_ids[at - len(opener) : at]) == {int(Segment.CONTEXT)}
    told = transcript(t)["turns"][1]
    assert told["fired"] == "confidence"
    assert told["confidence"] == pytest.approx(0.5)


@pytest.mark.parametrize("trigger", [OFF, TriggerConfig(confidence_margin=0.41)])
def test_no_doubt_without_the_clause_or_inside_the_margin(tokenizer, environment, trigger):
    script = [act("a.txt", 0.9), act("b.txt", 0.5), answer(0.1)]
    t, prompts = roll(tokenizer, environment, script, trigger=trigger)
    assert all(u.fired is None for u in t.turns)
    assert REFLECTION_OPENER not in "".join(prompts)


def test_a_final_answer_ends_the_episode_whatever_its_confidence(tokenizer, environment):
    t, _ = roll(tokenizer, environment, [act("a.txt", 0.9), answer(0.1)])
    assert t.done
    assert t.answer == "7"


def test_at_most_one_block_a_step(tokenizer, environment):
    script = [act("a.txt", 0.9), act("b.txt", 0.5), act("b.txt", 0.01, reflection=REST)]
    t, prompts = roll(tokenizer, environment, [*script, answer(0.9)])
    assert prompts[-1].count(REFLECTION_OPENER) == 1
    assert [u.step for u in t.turns] == [0, 1, 1, 2]


def test_corrections_and_reflections_do_not_raise_the_bar(tokenizer, environment):
    script = [
        act("none.txt", 0.5),
        act("a.txt", 0.99, reflection=REST, of_reflection=0.99),
        act("b.txt", 0.6),  # below the mean of 0.5 and 0.99
        answer(0.9),
    ]
    t, _ = roll(tokenizer, environment, script)
    assert [u.fired for u in t.turns] == [Clause.FAILURE, None, None, None]
    # A reflection that nobody asked for does not count either.
    full = REFLECTION.render()
    script = [act("a.txt", 0.5), act("b.txt", 0.6, reflection=full, of_reflection=0.01)]
    t, _ = roll(tokenizer, environment, [*script, answer(0.9)])
    assert [u.fired for u in t.turns] == [None] * 3
    assert t.turns[1].confidence == pytest.approx(0.6)


def test_a_correction_of_a_call_that_worked_may_fail(tokenizer, environment):
    script = [act("a.txt", 0.9), act("b.txt", 0.5), act("none.txt", 0.9, reflection=REST)]
    t, prompts = roll(tokenizer, environment, [*script, answer(0.9)])
    assert t.success
    assert [u.step for u in t.turns] == [0, 1, 1, 2]
    assert not prompts[-1].endswith(REFLECTION_OPENER)
    # The failure of the next step is one of its own.
    again = [act("none.txt", 0.9), act("a.txt", 0.9, reflection=REST), answer(0.9)]
    t, _ = roll(tokenizer, environment, script + again)
    assert [(u.step, u.correction) for u in t.turns[3:]] == [(2, False), (2, True), (3, False)]
    # And a correction of a failure ends the episode when it fails.
    failed = [act("a.txt", 0.9), act("none.txt", 0.5), act("none.txt", 0.9, reflection=REST)]
    t, _ = roll(tokenizer, environment, failed)
    assert t.done
    assert t.answer is None


@pytest.mark.parametrize(("repair", "success"), [("b.txt", True), ("none.txt", False)])
def test_a_doubted_local_trajectory_is_judged_by_its_correction(
    tokenizer, environment, repair, success
):
    start = Start(TASK, tuple(opening("?")), step=1, expected="8", confidences=(0.9,))
    script = [act("a.txt", 0.5), act(repair, 0.9, reflection=REST)]
    t, _ = roll(tokenizer, environment, script, start=start, whole=False)
    assert t.success is success
    assert len(t.turns) == 2
    t, _ = roll(
        tokenizer,
        environment,
        [act("b.txt", 0.5)],
        start=Start(TASK, start.messages, step=1, expected="8"),
        whole=False,
    )
    assert t.success


def test_doubt_needs_reflection(tokenizer, environment):
    with pytest.raises(ValueError, match="expected null where reflect is false"):
        run(Scripted(tokenizer, []), environment, [], reflect=False, whole=True, trigger=ON)


# Steps that came from data.


def test_first_calls(demonstrations):
    demo = next(d for d in demonstrations if len(d.task.steps) > 2 and len(d.traps) > 1)
    messages = demo.messages(demo.traps, until=len(demo.task.steps) - 1)
    found = first_calls(messages, before=len(demo.task.steps) - 1)
    expected = [(step.trap or step.call).render() for step in demo.task.steps[:-1]]
    assert [messages[i]["content"].split("```py\n")[1][:-4] for i in found] == expected
    assert first_calls(messages, before=1) == found[:1]
    assert first_calls(messages, before=0) == []
    assert step_of(observation_turn(12, "[OUTPUT OF STEP 3] -> Observation:\n")) == 12
    with pytest.raises(ValueError, match="expected the observation of a step"):
        step_of("Task: ?")


def test_confidences_are_those_that_sampling_would_have_had(model, tokenizer, demonstrations):
    demo = next(d for d in demonstrations if len(d.task.steps) > 2 and d.traps)
    messages = demo.messages(demo.traps, until=len(demo.task.steps) - 1)
    start = Start(demo.task, tuple(messages), step=len(demo.task.steps) - 1)
    first = Start(demo.task, tuple(messages[:2]), step=0)
    forced = Start(demo.task, tuple(messages[:4]), step=1, failed=True)
    own = Start(demo.task, tuple(messages), step=1, confidences=(0.25,))
    scored = with_confidences(
        model, tokenizer, [first, start, forced, own, start], temperature=0.7, batch_tokens=1200
    )
    assert (scored[0], scored[2], scored[3]) == (first, forced, own)
    chat = ChatFormat(tokenizer)
    expected = []
    for index in first_calls(messages, start.step):
        prompt = chat.prompt(messages[:index])
        turn = [*chat.encode(messages[index]["content"]), chat.end_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + turn])).logits[0]
        log_probs = (logits / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        expected.append(log_probs.gather(1, torch.tensor(turn)[:, None]).mean().exp().item())
    assert scored[1].confidences == pytest.approx(expected, rel=1e-4)
    assert scored[4] == scored[1]
    assert len(expected) == start.step


def test_training_knows_what_came_before(base, environment, tmp_path, monkeypatch):
    seen = []

    def spy(policy, environment, starts, **kwargs):
        seen.extend(starts)
        assert kwargs["trigger"] == ON
        return run(policy, environment, starts, **kwargs)

    monkeypatch.setattr("regrpo.collect.run", spy)
    config = rl_config(
        base, tmp_path, steps=2, states=4, forced_share=0.2, trigger=ON, max_new_tokens=8
    )
    run_rl(config, environment)
    assert all(math.isfinite(line["loss"]) for line in metrics_of(tmp_path))
    later = [s for s in seen if s.step > 0 and not s.failed]
    assert later
    assert all(len(s.confidences) == s.step for s in later)
    assert all(0 < u < 1 for s in later for u in s.confidences)
