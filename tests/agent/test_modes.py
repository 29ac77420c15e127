"""States from the policy's own episodes, whole episodes, and what each mode trains and reports."""

import random

import pytest
from runs import metrics_of, rl_config

from regrpo.collect import draw_groups, sample_starts
from regrpo.config import TriggerConfig
from regrpo.modeling import load_model
from regrpo.offline import Script
from regrpo.own_states import own_states, states_of
from regrpo.prompts import observation_turn, thought
from regrpo.rl import run_rl
from regrpo.rollout import Trajectory, TurnRecord, run, task_start
from regrpo.sampling import LocalPolicy
from regrpo.segments import ChatFormat
from regrpo.tasks import generate_tasks
from regrpo.tool_calls import Turn
from regrpo.tools import Observation, Status
from regrpo_kernels import Segment

START = task_start(generate_tasks(1, seed=0)[0])
REFERENCE = ["number 1", "number 2", "3"]


def episode(*turns):
    """An episode of `(step, observation)`: a second turn of a step corrects the first."""
    records, before = [], None
    for number, (step, text) in enumerate(turns):
        status = Status.ERROR if text.startswith("Error") else Status.OK
        observation = Observation(text, status)
        records.append(TurnRecord(step, f"turn {number}", observation, step == before, 0))
        before = step
    return Trajectory(START, turns=records)


def states(*turns):
    return [(s.step, s.failed, s.expected) for s in states_of(episode(*turns), REFERENCE)]


def test_every_turn_on_the_track_is_a_state():
    turns = ((0, "number 1"), (1, "Error: none"), (1, "number 2 "), (2, "3"))
    assert states(*turns) == [
        (0, False, "number 1"),
        (1, False, "number 2"),
        (1, True, "number 2"),
        (2, False, "3"),
    ]


def test_the_states_hold_the_policys_turns_and_what_they_observed():
    found = states_of(episode((0, "Error: none"), (0, "number 1"), (1, "number 2")), REFERENCE)
    assert found[0].messages == START.messages
    assert found[2].messages == (
        *START.messages,
        {"role": "assistant", "content": "turn 0"},
        {"role": "user", "content": observation_turn(0, "Error: none")},
        {"role": "assistant", "content": "turn 1"},
        {"role": "user", "content": observation_turn(0, "number 1")},
    )


def test_steps_may_come_in_another_order():
    """The first of the reference that is not done is expected, not the one of this number."""
    turns = ((0, "number 2"), (1, "number 1"), (2, "3"))
    assert states(*turns) == [(0, False, "number 1"), (1, False, "number 1"), (2, False, "3")]


def test_off_the_track_there_is_no_state():
    """Neither behind something else that worked, nor behind a step done twice."""
    assert states((0, "number 7"), (1, "number 1"), (2, "3")) == [(0, False, "number 1")]
    assert states((0, "number 1"), (1, "number 1"), (2, "number 2")) == [
        (0, False, "number 1"),
        (1, False, "number 2"),
    ]


@pytest.fixture(scope="module")
def solved(demonstrations, tokenizer, environment):
    """Of a policy that solves every task, through its traps: the turns, and a state of each."""
    chat = ChatFormat(tokenizer)
    scripts = []
    for demo in demonstrations:
        failures = {f.step: f for f in demo.traps}
        script = []
        for index, step in enumerate(demo.task.steps):
            failure = failures.get(index)
            if failure is not None:
                script.append(Turn(None, thought(failure.call.name), failure.call))
            reflection = failure.reflection if failure else None
            script.append(Turn(reflection, thought(step.call.name), step.call))
        scripts.append(script)
    states = [task_start(demo.task) for demo in demonstrations]
    rng = random.Random(0)
    own = own_states(
        Script(chat, scripts),
        environment,
        states,
        rng,
        reflect=True,
        max_steps=6,
        trigger=TriggerConfig(),
    )
    return chat, scripts, own


def test_own_states_are_where_the_policy_was_and_can_go_on(solved, demonstrations, environment):
    chat, scripts, own = solved
    assert own.turns == sum(map(len, scripts))
    assert own.off_track == 0
    rest = []
    for demo, script, start in zip(demonstrations, scripts, own.starts, strict=True):
        taken = (len(start.messages) - 2) // 2
        assert start.task == demo.task
        assert start.messages == tuple(demo.messages(demo.traps))[: len(start.messages)]
        assert start.failed == (script[taken].reflection is not None)
        rest.append(script[taken : taken + 2 if not start.failed else taken + 1])
    assert {s.failed for s in own.starts} == {True, False}
    assert {s.step for s in own.starts} >= {0, 1}
    # A step that works at the first try is a turn, one with a trap two: each succeeds from there.
    rest = [t[:1] if len(t) > 1 and t[1].reflection is None else t for t in rest]
    done = run(Script(chat, rest), environment, own.starts, reflect=True, whole=False)
    assert all(t.success for t in done)


@pytest.fixture(scope="module")
def policy(base, tokenizer):
    model = load_model(str(base / "model")).eval()
    return LocalPolicy(model, tokenizer, max_new_tokens=24)


def test_shares_of_states(base, environment, policy, tmp_path):
    config = rl_config(
        base, tmp_path, states=40, group_size=2, forced_share=0.5, own_states_share=0.3
    )
    groups, metrics = draw_groups(config, policy, environment, 3)
    starts = [group[0].start for group in groups]
    reference = sample_starts(config, environment, 3)
    forced = [s for s in reference if s.failed]
    assert [s for s in starts if s in forced] == forced  # those are left as they are
    own = [s for s, before in zip(starts, reference, strict=True) if s != before]
    assert 0 < len(own) <= round(40 * metrics["states/own"]) <= 40 - len(forced)
    assert metrics["states/own"] == pytest.approx(0.3, abs=0.15)
    assert 0 <= metrics["states/own_off_track"] < 1
    assert all(len(t.turns) <= 2 for group in groups for t in group)


def test_without_a_share_of_own_states_nothing_changes(base, environment, policy, tmp_path):
    config = rl_config(base, tmp_path, group_size=2)
    groups, metrics = draw_groups(config, policy, environment, 3)
    assert [group[0].start for group in groups] == sample_starts(config, environment, 3)
    assert metrics == {}


def test_episodes_start_at_the_task_or_behind_a_near_miss_and_end_in_an_answer(
    base, environment, policy, tmp_path
):
    config = rl_config(base, tmp_path, mode="episodes", states=12, forced_share=0.5, max_steps=2)
    starts = sample_starts(config, environment, 0)
    assert {s.failed for s in starts} == {True, False}
    assert all(s == task_start(s.task) for s in starts if not s.failed)
    groups, metrics = draw_groups(config, policy, environment, 0)
    trajectories = [t for group in groups for t in group]
    assert [t.start for t in trajectories[:: config.group_size]] == starts
    for t in trajectories:
        assert t.success <= (t.answer is not None)
        assert sum(turn.correction for turn in t.turns) <= config.max_steps
        assert t.tokens.count(Segment.REFLECTION) == sum(u.reflection_tokens for u in t.turns)
    assert metrics["episode/turns"] >= 1
    assert metrics["episode/answered"] >= sum(t.success for t in trajectories) / len(trajectories)


MODES = {
    "local": ({}, set()),
    "own": (
        {"own_states_share": 0.7, "forced_share": 0.3},
        {"states/own", "states/own_failed", "states/own_off_track"},
    ),
    "episodes": (
        {"mode": "episodes"},
        {"episode/turns", "episode/answered", "episode/reflections"},
    ),
    "offline": (
        {"mode": "offline", "policy": "reinforce", "group_size": 5},
        {"success/one_shot", "success/failed_recovery", "states/without_near_miss"},
    ),
}
OWN = {name for _, names in MODES.values() for name in names}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_and_reports(mode, base, environment, tmp_path):
    settings, names = MODES[mode]
    run_rl(rl_config(base, tmp_path, steps=2, **settings), environment)
    lines = metrics_of(tmp_path)
    assert len(lines) == 2
    assert OWN & set(lines[0]) == names
    assert any(line["grad_norm"] > 0 for line in lines)
    assert {"success", "recovery", "reward/mean", "kl", "loss"} <= set(lines[0])


@pytest.mark.parametrize("policy_name", ["reinforce", "cispo", "sapo"])
def test_other_objectives_train_on_policy(policy_name, base, environment, tmp_path):
    run_rl(rl_config(base, tmp_path, policy=policy_name, steps=2), environment)
    assert len({line["loss"] for line in metrics_of(tmp_path)}) == 2
