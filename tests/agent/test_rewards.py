"""The verifier's scores, and how rewards become advantages."""

import itertools
import statistics

import pytest
import torch

from regrpo.advantages import advantages_of
from regrpo.config import RewardConfig, TrainConfig
from regrpo.packing import collate
from regrpo.prompts import observation_turn, opening
from regrpo.rewards import (
    answer_score,
    grounding_score,
    plan_score,
    verifier_scores,
    verifier_value,
)
from regrpo.rollout import Trajectory, TurnRecord
from regrpo.tasks import Step, Task
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import Observation, Status
from regrpo.trajectory import Start
from regrpo_kernels import Segment

OBSERVATION = (
    "FileNotFoundError: No such file or directory: 'oak.csv'\noak.txt\npine.txt\n"
    "birch -> fern\nfern -> pine\nelm fern\nfern fern\nash fern"
)
TASK = Task(
    "t",
    "formats",
    "What is the number in oak.csv?",
    "number 7",
    (),
    (Step(ToolCall("read_file", ("oak.txt",))), Step(ToolCall("final_answer", ("number 7",)))),
)
START = Start(TASK, tuple(opening(TASK.question)), expected="number 7")
FAILED, RIGHT = ToolCall("read_file", ("oak.csv",)), ToolCall("read_file", ("oak.txt",))
GOOD = Reflection("ArgInvalid", "oak.txt", "use oak.txt")


def text(call, reflection=None):
    return Turn(reflection, "I will act.", call).render()


def turn(content, seen, status=Status.OK, *, correction=False, step=0):
    return TurnRecord(step, content, Observation(seen, status), correction, 0)


def repaired(reflection, call=RIGHT, seen="number 7"):
    failed = turn(text(FAILED), OBSERVATION, Status.ERROR)
    return Trajectory(START, turns=[failed, turn(text(call, reflection), seen, correction=True)])


def test_an_answer_is_scored_by_its_words():
    assert answer_score(" Number 7\n", "number 7") == 1.0
    assert answer_score("number 8", "number 7") == 0.5
    assert answer_score("the number is 7", "number 7") == pytest.approx(2 * 2 / 6)
    assert answer_score("8", "number 7") == answer_score("", "number 7") == 0.0


def test_evidence_must_cite_a_rare_span():
    known = TASK.question
    assert grounding_score("oak.txt", OBSERVATION, known) == 1.0
    assert grounding_score("birch -> fern -> pine", OBSERVATION, known) == 1.0
    assert grounding_score("birch -> pine", OBSERVATION, known) == 0.0  # each stands there, apart
    assert grounding_score("No such file, so it is gone", OBSERVATION, known) == 3 / 7
    assert grounding_score("oak.csv", OBSERVATION, known) == 0.0  # the question says it
    assert grounding_score("fern", OBSERVATION, known) == 0.0  # in five lines
    assert grounding_score("", OBSERVATION, known) == 0.0
    assert grounding_score("pine.txt\noak.txt", "oak.txt\npine.txt", known) == 0.0  # across lines


def test_a_plan_names_what_the_corrected_call_changed():
    assert plan_score("use oak.txt", FAILED, RIGHT) == 1.0
    assert plan_score("try another file", FAILED, RIGHT) == 0.0
    assert plan_score("use oak.txt", FAILED, FAILED) == 0.0
    box = ToolCall("read_region", ("page.png", 1, 10, 3, 20))
    moved = ToolCall("read_region", ("page.png", 1, 50, 3, 60))
    assert plan_score("use [1, 50, 3, 60]", box, moved) == 1.0
    assert plan_score("move it to 50", box, moved) == 0.5
    other = ToolCall("sql", ("oak.csv",))
    assert plan_score("use sql", FAILED, other) == 1.0
    assert plan_score("use read_file", FAILED, other) == 0.0
    fewer = ToolCall("read_region", ("page.png",))
    assert plan_score("read_region on the whole page", box, fewer) == 1.0
    assert plan_score("call read_file", None, RIGHT) == 1.0
    trimmed = ToolCall("read_file", ("oak.txt +",))
    assert plan_score("use oak.txt", trimmed, RIGHT) == 1.0
    keyword = ToolCall("f", kwargs={"a": [1, {"b": "two"}]})
    assert plan_score("one, b, two", ToolCall("f"), keyword) == pytest.approx(2 / 3)


def test_the_teachers_reflections_score_high(demonstrations):
    grounding, plan = [], []
    for demo in demonstrations:
        known = "\n".join(m["content"] for m in opening(demo.task.question))
        for failure in demo.failures:
            seen, reflection = failure.observation.text, failure.reflection
            grounding.append(grounding_score(reflection.evidence, seen, known))
            right = demo.task.steps[failure.step].call
            if len(failure.call.args) == len(right.args):  # else the plan names the tool only
                plan.append(plan_score(reflection.fix_plan, failure.call, right))
    assert len(plan) > 50
    assert statistics.mean(plan) > 0.9
    assert statistics.mean(grounding) > 0.8
    assert all(0 <= s <= 1 for s in [*grounding, *plan])


def test_a_trajectorys_scores_come_from_what_was_executed():
    assert verifier_scores(repaired(GOOD)) == {"answer": 1.0, "grounding": 1.0, "plan": 1.0}
    assert verifier_value(verifier_scores(repaired(GOOD))) == 1.0
    wrong = Reflection("ArgInvalid", "it broke", "try again")
    assert verifier_scores(repaired(wrong)) == {"answer": 1.0, "grounding": 0.0, "plan": 0.0}
    # Without a reflection nothing is cited or planned.
    assert verifier_value(verifier_scores(repaired(None))) == 0.25
    first_try = Trajectory(START, turns=[turn(text(RIGHT), "number 7")])
    assert verifier_scores(first_try) == {"answer": 1.0, "grounding": 0.0, "plan": 0.0}


def test_a_failed_or_malformed_turn_scores_nothing():
    t = repaired(GOOD)
    t.turns[1] = turn(t.turns[1].text + "\nCode:\n```py\nx()\n```", "number 7", correction=True)
    assert verifier_scores(t) == {"answer": 1.0, "grounding": 0.0, "plan": 0.0}
    t.turns[1] = turn(text(RIGHT, GOOD), "number 7", Status.ERROR, correction=True)
    assert verifier_scores(t)["answer"] == 0.0


def test_a_forced_failure_stands_in_the_conversation():
    forced = (
        *START.messages,
        {"role": "assistant", "content": text(FAILED)},
        {"role": "user", "content": observation_turn(0, OBSERVATION)},
    )
    start = Start(TASK, forced, expected="number 7", failed=True)
    t = Trajectory(start, turns=[turn(text(RIGHT, GOOD), "number 7", correction=True)])
    assert verifier_scores(t) == {"answer": 1.0, "grounding": 1.0, "plan": 1.0}


def test_an_answer_counts_where_one_is_due():
    answer = text(ToolCall("final_answer", ("number 7",)))
    premature = Trajectory(START, turns=[turn(answer, "number 7")], answer="number 7")
    assert verifier_scores(premature)["answer"] == 0.0
    last = Start(TASK, START.messages, step=1, expected="number 7")
    in_time = Trajectory(last, turns=[turn(answer, "number 7", step=1)], answer="number 7")
    assert verifier_scores(in_time)["answer"] == 1.0
    missing = Trajectory(last, turns=[turn(text(RIGHT), "number 7", step=1)])
    assert verifier_scores(missing)["answer"] == 0.0
    episode = Start(TASK, START.messages)
    done = Trajectory(episode, turns=[turn(answer, "number 7")], answer="number 7")
    assert verifier_scores(done)["answer"] == 1.0
    assert verifier_scores(Trajectory(episode, turns=done.turns))["answer"] == 0.0


def sampled(success, reflection, reflect_well=True):
    t = repaired(GOOD if reflect_well else None)
    t.success = success
    t.tokens.extend([5] * 4, Segment.CONTEXT)
    t.tokens.extend([6] * 3, Segment.ACTION, [-1.0] * 3)
    t.tokens.extend([5] * 2, Segment.OBSERVATION)
    t.tokens.extend([6] * reflection, Segment.REFLECTION, [-1.0] * reflection)
    t.tokens.extend([6] * 3, Segment.ACTION, [-1.0] * 3)
    return t


def scored(trajectories, size, **reward):
    config = TrainConfig(model="", out="", group_size=size, reward=RewardConfig(**reward))
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    return advantages_of(trajectories, batch, config)


def test_where_all_succeed_cost_noise_stays_small():
    group = [sampled(True, n) for n in (10, 11, 12)]  # costs .010, .011, .012
    noisy, _ = scored(group, 3, scale="group", min_std=0.0)
    assert noisy.advantages.tolist() == pytest.approx([0.91, 0, -0.91], abs=0.01)
    floored, _ = scored(group, 3, scale="group")
    assert floored.advantages.tolist() == pytest.approx([0.01, 0, -0.01], abs=1e-4)
    # Where outcomes differ the floor has no part.
    mixed = [sampled(True, 10), sampled(False, 10), sampled(False, 10)]
    with_floor, _ = scored(mixed, 3, scale="group", clip=None)
    without, _ = scored(mixed, 3, scale="group", min_std=0.0, clip=None)
    assert torch.equal(with_floor.advantages, without.advantages)
    assert with_floor.advantages[0] == pytest.approx(1.1547, abs=1e-3)


def test_baselines_and_scales():
    group = [sampled(s, 0) for s in (True, True, False, False)] + [
        sampled(s, 0) for s in (True, False, False, False)
    ]
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0])
    for baseline, scale in itertools.product(
        ("mean", "leave_one_out", "none"), ("none", "group", "batch")
    ):
        result, _ = scored(group, 4, baseline=baseline, scale=scale, clip=None)
        assert torch.equal(result.rewards, rewards)
        grouped = rewards.view(2, 4)
        others = (grouped.sum(1, keepdim=True) - grouped) / 3
        expected = {"mean": grouped - grouped.mean(1, keepdim=True), "none": grouped}.get(
            baseline, grouped - others
        )
        if scale != "none":
            std = grouped.std(1, keepdim=True) if scale == "group" else rewards.std()
            expected = expected / (std + 1e-4)
        torch.testing.assert_close(result.advantages, expected.flatten())


def test_the_verifier_enters_the_reward():
    group = [sampled(True, 100), sampled(True, 100, reflect_well=False), sampled(False, 0)]
    result, metrics = scored(group, 3, lambda_exec=2.0, eta=0.5, lambda_val=0.4)
    # repaired(...) answers right each time; what differs is the reflection.
    assert result.rewards.tolist() == pytest.approx(
        [2 - 0.5 + 0.4 * 1.0, 2 - 0.5 + 0.4 * 0.25, 0.4 * 1.0]
    )
    assert metrics == {
        "verifier/answer": 1.0,
        "verifier/grounding": pytest.approx(2 / 3),
        "verifier/plan": pytest.approx(2 / 3),
    }


def test_two_streams_are_normalised_apart():
    group = [sampled(True, 50), sampled(True, 50, reflect_well=False), sampled(False, 0)]
    outcome, _ = scored(group, 3, scale="group")
    result, _ = scored(group, 3, scale="group", alpha=0.3)
    values = torch.tensor([1.0, 0.25, 1.0])
    verifier = (values - values.mean()) / (values.std() + 1e-4)
    expected = outcome.advantages + 0.3 * verifier.clamp(-1, 1)
    torch.testing.assert_close(result.advantages, expected)
    assert torch.equal(result.rewards, outcome.rewards)  # of the outcome
    # On the tokens as well, and on trained ones only.
    tokens = torch.tensor([len(t.tokens) for t in group])
    spread = expected.repeat_interleave(tokens) * result.loss_mask
    torch.testing.assert_close(result.token_advantages, spread)


def test_the_cost_grows_over_the_first_updates():
    group = [sampled(True, 100), sampled(True, 20)]
    batch = collate([t.tokens for t in group], with_old_log_probs=False)
    reward = RewardConfig(eta=0.4, eta_warmup_steps=10)
    config = TrainConfig(model="m", out="o", group_size=2, reward=reward)
    for step, eta in ((0, 0.0), (5, 0.2), (10, 0.4), (25, 0.4), (None, 0.4)):
        result, _ = advantages_of(group, batch, config, step=step)
        assert result.rewards.tolist() == pytest.approx([1 - eta * 1.0, 1 - eta * 0.2])
