"""Options from neighbouring work: each formula against plain arithmetic."""

import copy
import io
import itertools
import json
import math
import random
import statistics
from dataclasses import dataclass, field, replace

import pytest
import torch
from PIL import Image
from runs import metrics_of, rl_config, same, state_of

from regrpo.advantages import advantages_of, choose, group_ids
from regrpo.config import LoraSettings, OptimConfig, OptionsConfig, RewardConfig, TrainConfig
from regrpo.data_engine.build import local_starts
from regrpo.learner import Learner
from regrpo.losses import policy_loss
from regrpo.modeling import head, hidden_states
from regrpo.options.clip_bounds import adaptive_bounds
from regrpo.options.demonstrations import demonstration_tokens, hard_states
from regrpo.options.down_sampling import max_variance_subset
from regrpo.options.penalties import success_penalties
from regrpo.options.refinements import join_refinements, shaped_slope
from regrpo.options.replay import join_replays, pack, unpack
from regrpo.options.resampling import collapsed, resample
from regrpo.options.segment_ratios import segment_bounds
from regrpo.options.step_advantages import anchor_states, spread_over_tokens, step_advantages
from regrpo.packing import collate
from regrpo.prompts import REFLECTION_OPENER, opening
from regrpo.rewards import verifier_scores
from regrpo.rl import run_rl, update
from regrpo.rollout import Trajectory, TurnRecord, run
from regrpo.sampling import Sample
from regrpo.segments import ChatFormat
from regrpo.tasks import Step, Task
from regrpo.tool_calls import Reflection, ToolCall, Turn
from regrpo.tools import Observation, Status
from regrpo.trainer import Run
from regrpo.trajectory import Start
from regrpo.workspace import TextFile
from regrpo_kernels import Objective, Segment

TASK = Task(
    "t",
    "formats",
    "What is the number in oak.csv?",
    "number 7",
    (TextFile("oak.txt", "number 7"), TextFile("pine.txt", "number 8")),
    (Step(ToolCall("read_file", ("oak.txt",))), Step(ToolCall("final_answer", ("number 7",)))),
)
START = Start(TASK, tuple(opening(TASK.question)), expected="number 7")


def config(**options):
    rest = {k: options.pop(k) for k in list(options) if k not in vars(OptionsConfig())}
    return TrainConfig(**{"model": "", "out": "", "options": OptionsConfig(**options), **rest})


def trajectory(success, *turns, seed=0, start=START):
    """Turns are lists of (kind, tokens); between them stands an observation."""
    generator = torch.Generator().manual_seed(seed)
    t = Trajectory(start, success=success, done=True)
    t.tokens.extend([3, 4, 5], Segment.CONTEXT)
    for index, spans in enumerate(turns):
        for kind, count in spans:
            ids = torch.randint(5, 150, (count,), generator=generator).tolist()
            log_probs = (-5.5 - 1.5 * torch.rand(count, generator=generator)).tolist()
            t.tokens.extend(ids, kind, log_probs)
        t.tokens.extend([6, 7], Segment.OBSERVATION)
        status = Status.OK if success and index == len(turns) - 1 else Status.ERROR
        t.turns.append(TurnRecord(0, f"turn {index}", Observation("o", status), index > 0, 0))
    return t


def png(level):
    """A picture with one spot, whose left half is of a grey level."""
    picture = Image.new("L", (8, 8), 255)
    picture.paste(0, (2, 2, 6, 6))
    picture.paste(level, (2, 2, 4, 6))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


A, R = Segment.ACTION, Segment.REFLECTION
LONG = ([(A, 3)], [(R, 4), (A, 2)])


@dataclass
class Gradients:
    """Stands for a run: keeps the gradient of each update and changes nothing."""

    model: torch.nn.Module
    tokenizer: object = None
    reader: object = None
    device: str = "cpu"
    lr: float = 0.0
    step: int = 0
    seen: list = field(default_factory=list)

    def update(self):
        self.seen.append(
            {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        )
        self.model.zero_grad()
        return 0.0


def gradients(model, learner_config, trajectories, groups=None, tokenizer=None):
    training = Gradients(copy.deepcopy(model), tokenizer)
    metrics = update(training, Learner(training.model, learner_config), trajectories, groups)
    return training.seen, metrics


def plain_log_probs(model, batch):
    weight, _ = head(model)
    logits = hidden_states(model, batch).double() @ weight.double().T
    return logits.log_softmax(-1).gather(1, batch.labels.clamp(min=0)[:, None]).squeeze(1)


def assert_gradient(model, loss, ours):
    model.zero_grad()
    loss.backward()
    assert any(g.abs().max() > 1e-5 for g in ours.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-3, atol=1e-6, msg=name)


# --- segment-level ratios -------------------------------------------------------------------------


def test_segments_are_reflections_and_actions_of_a_turn():
    batch = collate([trajectory(True, *LONG).tokens, trajectory(True, [(A, 2)]).tokens])
    rows = batch.loss_mask.nonzero().squeeze(1)
    assert segment_bounds(rows, batch.segment_ids).tolist() == [0, 3, 7, 9, 11]
    empty = torch.zeros(0, dtype=torch.int64)
    assert segment_bounds(empty, batch.segment_ids).tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_a_segment_has_the_geometric_mean_ratio(model, mode):
    trajectories = [trajectory(i == 0, *LONG, seed=i) for i in range(3)]
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    advantages = torch.tensor([0.7, -0.3, -0.4]).repeat_interleave(batch.cu_seqlens.diff())
    batch = replace(batch, advantages=advantages)
    objective = Objective(
        ratio_level="sequence",
        epsilon_low=0.3,
        epsilon_high=0.3,
        loss_agg_mode=mode,
        max_completion_length=50,
    )
    normalizer = 27.0 if mode == "token-mean" else 3.0
    hidden = hidden_states(model, batch)
    out = policy_loss(hidden, *head(model), batch, objective, normalizer, by_segment=True)
    out.loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    # Plainly: segments of 3, 4 and 2 tokens a trajectory.
    log_probs = plain_log_probs(model, batch)
    rows = batch.loss_mask.nonzero().squeeze(1)
    loss = 0
    for segment in rows.split([3, 4, 2] * 3):
        d = log_probs[segment] - batch.old_log_probs[segment]
        ratio = (d.mean().detach() + d - d.detach()).exp()
        a = advantages[segment]
        loss = loss - torch.minimum(ratio * a, ratio.clamp(0.7, 1.3) * a).sum()
    loss = loss / normalizer / (50 if mode.endswith("norm") else 1)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert_gradient(model, loss, ours)


def test_ratio_levels_differ_in_the_update(model):
    trajectories = [trajectory(i == 0, *LONG, seed=i) for i in range(3)]
    found = {
        level: gradients(model, config(ratio_level=level, group_size=3), trajectories)[0][0]
        for level in ("token", "segment", "sequence")
    }
    for a, b in itertools.combinations(found, 2):
        assert not same(found[a], found[b]), (a, b)


# --- adaptive clip bounds -------------------------------------------------------------------------

RATIOS = torch.tensor([1.0, 1.45, 1.95, 1.0, 0.65, 0.85])
SIGNS = torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0, -1.0])


def bounds(target, **kwargs):
    limits = {"low": 0.6, "high": 1.2, "low_max": 0.9, "high_max": 3.0, "step": 0.1}
    return adaptive_bounds(RATIOS.log(), SIGNS, target=target, **{**limits, **kwargs})


def test_clip_bounds_move_until_positive_advantages_carry_their_share():
    # P = .5, with 1.45 inside 1.225, with 1.95 as well 2.2; N = 1 + .65 + .85.
    assert bounds(0.1) == pytest.approx((0.6, 1.2, 0.5 / 3), abs=1e-6)
    assert bounds(0.3) == pytest.approx((0.6, 1.5, 1.225 / 3.725), abs=1e-6)
    assert bounds(0.4) == pytest.approx((0.6, 2.0, 2.2 / 4.7), abs=1e-6)
    # The upper bound first, up to its limit; then the lower: .65 falls out, then .85.
    assert bounds(0.5) == pytest.approx((0.7, 3.0, 2.2 / 4.05), abs=1e-6)
    assert bounds(0.6) == pytest.approx((0.9, 3.0, 2.2 / 3.2), abs=1e-6)
    assert bounds(0.99) == pytest.approx((0.9, 3.0, 2.2 / 3.2), abs=1e-6)  # no further
    assert bounds(0.99, low=0.95, high=4.0)[:2] == (0.95, 4.0)  # never tightened


def test_clip_bounds_without_negative_advantages_stay():
    found = adaptive_bounds(
        RATIOS.log(), SIGNS.abs(), low=0.8, high=1.2, low_max=0.9, high_max=3, step=0.1, target=0.9
    )
    assert found == (0.8, 1.2, 1.0)


def test_adapted_bounds_are_those_of_the_loss(model):
    trajectories = [trajectory(i == 0, *LONG, seed=i) for i in range(3)]
    fixed = config(group_size=3)
    adaptive = config(group_size=3, clip_target=0.9, clip_high_max=8.0)
    _, metrics = gradients(model, adaptive, trajectories)
    assert metrics["clip_bounds/high"] > 1.2
    assert metrics["clip_bounds/low"] >= 0.8
    low, high = 1 - metrics["clip_bounds/low"], metrics["clip_bounds/high"] - 1
    same_bounds = replace(fixed, epsilon_low=low, epsilon_high=high)
    (theirs,), _ = gradients(model, same_bounds, trajectories)
    (ours,), _ = gradients(model, adaptive, trajectories)
    (before,), _ = gradients(model, fixed, trajectories)
    assert same(ours, theirs)
    assert not same(ours, before)


# --- step-level advantages ------------------------------------------------------------------------


def episode(reward_steps, observations):
    """Turns with (step, correction), and what each saw."""
    t = Trajectory(START, turns=[])
    t.tokens.extend([3, 4], Segment.CONTEXT)
    for (step, correction), seen in zip(reward_steps, observations, strict=True):
        t.tokens.extend([9, 9], A, [-1.0, -1.0])
        t.tokens.extend([6], Segment.OBSERVATION)
        t.turns.append(TurnRecord(step, "", Observation(seen, Status.OK), correction, 0))
    return t


def test_turns_in_the_same_state_are_compared():
    trajectories = [
        episode([(0, False), (1, False)], ["x", "end"]),
        episode([(0, False), (1, False), (2, False)], ["x", "y", "end"]),
        episode([(0, False), (0, True)], ["error", "end"]),
        episode([(0, False), (1, False)], ["x", "end"]),  # another group
    ]
    rewards = torch.tensor([1.0, 0.5, 0.0, 1.0])
    found = step_advantages(
        trajectories, rewards, [0, 0, 0, 1], gamma=0.5, baseline="mean", scale="none", clip=None
    ).tolist()
    first = [0.5 * 1.0, 0.25 * 0.5, 0.5 * 0.0]  # gamma ** turns to go * R
    second = [1.0, 0.5 * 0.5]  # step 1 behind "x"
    assert found == pytest.approx(
        [
            first[0] - statistics.mean(first),
            second[0] - statistics.mean(second),
            first[1] - statistics.mean(first),
            second[1] - statistics.mean(second),
            0.0,  # alone at step 2
            first[2] - statistics.mean(first),
            0.0,  # the only correction
            0.0,
            0.0,
        ],
        abs=1e-6,
    )


def test_states_behind_different_pictures_differ():
    texts = ["part of page.png", "end"]
    trajectories = [episode([(0, False), (1, False)], texts) for _ in range(3)]
    for t, level in zip(trajectories, (0, 90, 0), strict=True):
        seen = t.turns[0].observation
        picture = replace(seen, image=png(level))
        t.turns[0] = replace(t.turns[0], observation=picture)
    states = anchor_states(trajectories, [0, 0, 0])
    assert states[1] == states[5] != states[3]


def test_a_turns_advantage_goes_to_its_tokens():
    trajectories = [trajectory(True, *LONG), trajectory(False, [(A, 2)])]
    batch = collate([t.tokens for t in trajectories])
    spread = spread_over_tokens(torch.tensor([1.0, 2.0, 3.0]), trajectories, batch)
    assert spread[batch.loss_mask].tolist() == [1.0] * 3 + [2.0] * 6 + [3.0] * 2
    assert (spread[~batch.loss_mask] == 0).all()
    trajectories[0].turns.pop()
    with pytest.raises(ValueError, match="trajectory 0 has 2 runs of trained tokens and 1 turns"):
        spread_over_tokens(torch.tensor([1.0, 3.0]), trajectories, batch)


def test_of_a_refinement_the_last_turn_has_an_advantage():
    plain, refined = trajectory(True, *LONG), trajectory(False, [(A, 2)])
    refined.turns.insert(0, refined.turns[0])  # what failed before: in its context, not trained
    refined.origin = "refinement"
    last = trajectory(False, [(A, 2)])
    batch = collate([t.tokens for t in (plain, refined, last)])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    spread = spread_over_tokens(values, [plain, refined, last], batch)
    assert spread[batch.loss_mask].tolist() == [1.0] * 3 + [2.0] * 6 + [4.0] * 2 + [5.0] * 2


def test_both_levels_add_up():
    trajectories = [trajectory(i < 1, *LONG, seed=i) for i in range(3)]
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    plain, _ = advantages_of(trajectories, batch, config(group_size=3))
    both, metrics = advantages_of(
        trajectories, batch, config(group_size=3, step_weight=0.5, step_gamma=0.9)
    )
    rule = {"baseline": "mean", "scale": "none", "min_std": 0.1, "clip": 1.0}
    steps = step_advantages(trajectories, plain.rewards, [0, 0, 0], gamma=0.9, **rule)
    expected = plain.token_advantages + 0.5 * spread_over_tokens(steps, trajectories, batch)
    assert torch.equal(both.token_advantages, expected)
    assert torch.equal(both.advantages, plain.advantages)
    assert metrics["step_advantage/compared"] == 1.0


# --- demonstrations -------------------------------------------------------------------------------


def test_demonstrations_go_on_from_their_state_and_end_in_the_right_call(demonstrations, tokenizer):
    starts = local_starts(demonstrations, random.Random(0), forced_share=0.5)
    by_task = {d.task.id: d for d in demonstrations}
    lengths = set()
    for start in starts:
        demo = by_task[start.task.id]
        lengths.add((start.failed, len(start.demonstration)))
        right = demo.task.steps[start.step].call.render()
        assert right in start.demonstration[-1]["content"]
        trapped = any(f.step == start.step for f in demo.traps)
        reflects = REFLECTION_OPENER in start.demonstration[-1]["content"]
        assert reflects == (start.failed or trapped)
        roles = [m["role"] for m in (*start.messages, *start.demonstration)]
        assert all(a != b for a, b in itertools.pairwise(roles))
    assert lengths == {(True, 1), (False, 1), (False, 3)}
    start = next(s for s in starts if len(s.demonstration) == 3)
    for reflect in (True, False):
        tokens = demonstration_tokens(tokenizer, start, reflect=reflect)
        trained = [
            i for i, k in zip(tokens.input_ids, tokens.segment_ids, strict=True) if k in (1, 3)
        ]
        shown = tokenizer.decode(trained)
        assert start.task.steps[start.step].call.render() in shown
        assert ("Reflection:" in shown) == reflect
        assert shown.count("Code:") == 1  # not the failed call


def test_hard_states_are_those_without_a_success():
    shown = replace(START, demonstration=({"role": "assistant", "content": "x"},))
    trajectories = [
        trajectory(s, [(A, 2)], start=start)
        for s, start in ((True, shown), (False, shown), (False, shown), (False, START))
    ]
    assert hard_states(trajectories, [0, 0, 1, 2]) == [shown]


def test_a_demonstration_adds_its_weighted_nll(model, tokenizer, demonstrations):
    start = local_starts(demonstrations[:1], random.Random(0), forced_share=1.0)[0]
    trajectories = [trajectory(False, *LONG, seed=i, start=start) for i in range(3)]
    plain = config(group_size=3, beta=0.0, reward=RewardConfig(eta=0.0))
    weighted = replace(plain, options=OptionsConfig(demonstration_weight=0.4))
    (before,), _ = gradients(model, plain, trajectories)
    assert all((g == 0).all() for g in before.values())
    (ours,), metrics = gradients(model, weighted, trajectories, tokenizer=tokenizer)
    batch = collate([demonstration_tokens(tokenizer, start, reflect=True)])
    nll = -plain_log_probs(model, batch)[batch.loss_mask].mean()
    assert metrics["demonstration/count"] == 1
    assert metrics["demonstration/nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert_gradient(model, 0.4 * nll, ours)
    solved = [replace(t, success=True) for t in trajectories]
    _, metrics = gradients(model, weighted, solved, tokenizer=tokenizer)
    assert metrics["demonstration/count"] == 0


# --- penalties ------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_penalties_are_on_successes_only_and_relative_to_them():
    reflections, lengths = [10, 50, 90, 500, 30], [100, 100, 160, 900, 70]
    success = [True, True, True, False, True]
    found = success_penalties(
        reflections, lengths, success, [0, 0, 0, 0, 1], penalty=0.2, thresholds=(40, 80)
    )
    mean_r, std_r = statistics.mean([10, 50, 90]), statistics.stdev([10, 50, 90])
    mean_n, std_n = statistics.mean([100, 100, 160]), statistics.stdev([100, 100, 160])
    for i, a1 in ((0, 0.05), (1, 0.1), (2, 0.15)):
        reflection = a1 * sigmoid((reflections[i] - mean_r) / (std_r + 1e-6))
        length = (0.2 - a1) * sigmoid((lengths[i] - mean_n) / (std_n + 1e-6))
        assert found[i] == pytest.approx((reflection, length))
    assert found[3] == (0.0, 0.0)
    assert found[4] == pytest.approx((0.05 / 2, 0.15 / 2))  # nothing to compare with


def test_penalties_come_off_the_reward():
    trajectories = [trajectory(s, *LONG, seed=i) for i, s in enumerate([True, True, False])]
    trajectories[1].tokens.extend([9] * 5, R, [-1.0] * 5)
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    reward = RewardConfig(eta=0.0, lambda_exec=2.0)
    result, metrics = advantages_of(
        trajectories, batch, config(group_size=3, penalty=0.2, reward=reward)
    )
    taken = success_penalties(
        [4, 9, 4], [9, 14, 9], [True, True, False], [0] * 3, penalty=0.2, thresholds=(40, 80)
    )
    expected = [2 * (1 - sum(taken[0])), 2 * (1 - sum(taken[1])), 0.0]
    assert result.rewards.tolist() == pytest.approx(expected)
    assert metrics["penalty/reflection"] == pytest.approx((taken[0][0] + taken[1][0]) / 2)
    assert result.rewards[0] > result.rewards[1]


# --- down-sampling --------------------------------------------------------------------------------


def test_the_subset_has_the_greatest_variance_of_all():
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        values = torch.randn(7, generator=generator).round(decimals=case % 3).tolist()
        for keep in range(2, 7):
            found = max_variance_subset(values, keep)
            assert found == sorted(set(found))
            assert len(found) == keep
            best = max(statistics.pvariance(c) for c in itertools.combinations(values, keep))
            assert statistics.pvariance([values[i] for i in found]) == pytest.approx(best)
    assert max_variance_subset([1.0, 1.0, 1.0], 2) == [0, 1]
    assert max_variance_subset([3.0, 1.0], 5) == [0, 1]


def test_down_sampled_trajectories_alone_are_trained_on(model):
    trajectories = [trajectory(i in (2, 5), *LONG, seed=i) for i in range(8)]
    settings = {"group_size": 4, "beta": 0.0, "reward": RewardConfig(eta=0.0)}
    (ours,), metrics = gradients(model, config(keep=2, **settings), trajectories)
    assert metrics["down_sampling/kept"] == 0.5
    # Advantages are those of all four: .75 and -.25.
    chosen = [trajectories[i] for i in (0, 2, 4, 5)]
    batch = collate([t.tokens for t in chosen], with_old_log_probs=True)
    a = torch.tensor([-0.25, 0.75, -0.25, 0.75]).repeat_interleave(batch.cu_seqlens.diff())
    ratio = (plain_log_probs(model, batch) - batch.old_log_probs).exp()
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)[batch.loss_mask].mean()
    assert_gradient(model, loss, ours)


# --- groups without variance ----------------------------------------------------------------------


def test_choices_about_groups_without_variance():
    trajectories = [trajectory(i in (0, 4, 5, 6), [(A, 3)], seed=i) for i in range(9)]
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    ids = group_ids(9, 3)  # 100, 011, 100
    for mode, used in (("keep", 9), ("skip", 9), ("resample", 9)):
        setting = config(group_size=3, zero_variance=mode)
        result, _ = advantages_of(trajectories, batch, setting)
        assert len(choose(result, batch, ids, setting).used) == used
    for t in trajectories[3:6]:
        t.success = True
    for mode, used in (("keep", 9), ("skip", 6), ("resample", 6)):
        setting = config(group_size=3, zero_variance=mode)
        result, _ = advantages_of(trajectories, batch, setting)
        choice = choose(result, batch, ids, setting)
        assert (len(choice.used), len(choice.kept)) == (used, 9)
        assert choice.metrics["groups/with_variance"] == pytest.approx(2 / 3)
        assert choice.metrics["groups/skipped"] == (used == 6)


def test_ids_and_sizes_of_groups_are_the_same_to_the_bit():
    trajectories = [trajectory(i % 3 == 0, [(A, 2), (R, 1 + i % 5)], seed=i) for i in range(12)]
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    setting = config(group_size=4, reward=RewardConfig(scale="group"))
    ids = [7] * 4 + [3] * 4 + [5] * 4
    result = advantages_of(trajectories, batch, setting)[0]
    assert same(list(result), list(advantages_of(trajectories, batch, setting, ids)[0]))


def group(*outcomes):
    return [trajectory(s, [(A, 2)], seed=i) for i, s in enumerate(outcomes)]


def test_collapsed_groups_get_new_states():
    mixed, none, every = group(True, False), group(False, False), group(True, True)
    better = group(False, True)
    asked = []

    def draw(number, count):
        asked.append((number, count))
        return [[group(False, False), better], [group(True, True)], []][number - 1]

    groups, metrics = resample([none, mixed, every], draw, 3)
    assert asked == [(1, 2), (2, 1), (3, 1)]
    assert groups == [better, mixed, every]
    assert not collapsed(mixed)
    assert metrics == {
        "groups/resampled": 1,
        "groups/resample_rounds": 3,
        "sampled/trajectories": 12,
        "sampled/success": pytest.approx(6 / 12),
    }
    groups, metrics = resample([mixed], draw, 3)
    assert (groups, metrics["groups/resample_rounds"]) == ([mixed], 0)


# --- replay ---------------------------------------------------------------------------------------


def test_a_trajectory_is_the_same_after_a_checkpoint(tmp_path):
    t = trajectory(True, *LONG)
    torch.save({"extra": pack(t)}, tmp_path / "x.pt")
    entry = torch.load(tmp_path / "x.pt", weights_only=True)["extra"]
    assert unpack(entry, START) == replace(t, origin="replay")
    json.dumps(entry)


def test_a_trajectory_keeps_what_it_saw_through_a_checkpoint(tmp_path):
    t = trajectory(True, *LONG)
    seen = replace(t.turns[-1].observation, image=png(0))
    t.turns[-1] = replace(t.turns[-1], observation=seen)
    start = replace(START, expected=seen.identity)
    torch.save(pack(replace(t, start=start)), tmp_path / "x.pt")
    replayed = unpack(torch.load(tmp_path / "x.pt", weights_only=True), start)
    assert replayed.turns[-1].observation == seen
    assert verifier_scores(replayed)["answer"] == 1.0


def test_replays_join_collapsed_groups_of_their_state():
    other = replace(START, step=1, expected="x")
    entries = []
    first = [group(True, False), [trajectory(False, [(A, 2)], start=other)]]
    _, metrics = join_replays(first, entries, 10)
    assert metrics == {"replay/joined": 0, "replay/stored": 3}
    failed, solved = group(False, False), group(True, True)
    (groups, metrics) = join_replays([failed, solved, group(True, False)], entries, 10)
    assert metrics == {"replay/joined": 2, "replay/stored": 3}
    assert [[t.success for t in g] for g in groups] == [
        [False, False, True],
        [True, True, False],
        [True, False],
    ]
    replayed = groups[0][-1]
    assert replayed.origin == "replay"
    assert replayed.tokens == first[0][0].tokens  # with the log-probs of then
    # A state that was never solved has nothing to offer.
    assert (
        len(join_replays([[trajectory(False, [(A, 2)], start=other)] * 2], entries, 10)[0][0]) == 2
    )


def test_the_newest_are_kept():
    entries = []
    for seed in range(3):
        join_replays([[trajectory(True, [(A, 2)], seed=seed)]], entries, 10)
    assert len(entries) == 1
    newest = trajectory(True, [(A, 2)], seed=2).tokens
    assert {**entries[0]["tokens"], "images": {}} == vars(newest)
    starts = [replace(START, step=i) for i in range(5)]
    join_replays([[trajectory(True, [(A, 2)], start=s)] for s in starts], entries, 3)
    assert [e["tokens"]["input_ids"] for e in entries] == [
        trajectory(True, [(A, 2)]).tokens.input_ids
    ] * 3
    replayed = unpack(entries[0], starts[2])
    join_replays([[replayed]], entries, 3)
    assert len(entries) == 3


def test_a_replay_gives_a_collapsed_group_a_gradient(model):
    failed = [trajectory(False, *LONG, seed=i) for i in range(3)]
    replayed = replace(trajectory(True, *LONG, seed=9), origin="replay")
    setting = config(group_size=3, beta=0.0, reward=RewardConfig(eta=0.0))
    (before,), _ = gradients(model, setting, failed)
    assert all((g == 0).all() for g in before.values())
    (ours,), metrics = gradients(model, setting, [*failed, replayed], [0] * 4)
    assert metrics["success"] == 0.0  # of what was sampled
    assert metrics["groups/all_failed"] == 1.0
    batch = collate([t.tokens for t in [*failed, replayed]], with_old_log_probs=True)
    a = torch.tensor([-0.25] * 3 + [0.75]).repeat_interleave(batch.cu_seqlens.diff())
    ratio = (plain_log_probs(model, batch) - batch.old_log_probs).exp()
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)[batch.loss_mask].mean()
    assert_gradient(model, loss, ours)


# --- refinements ----------------------------------------------------------------------------------

REFLECTION = Reflection("ArgInvalid", "oak.txt", "use oak.txt")


def act(path, reflection=None):
    return Turn(reflection, "I will read.", ToolCall("read_file", (path,))).render()


class Scripted:
    """Says the next turn of the script, whatever it is asked; keeps the prompts."""

    def __init__(self, tokenizer, *script):
        self.chat = ChatFormat(tokenizer)
        self.script = list(script)
        self.prompts = []

    def session(self):
        return self

    def generate(self, prompts, numbers):
        self.prompts += prompts
        samples = []
        for _ in prompts:
            ids = [*self.chat.encode(self.script.pop(0)), self.chat.end_id]
            samples.append(Sample(ids, [-0.5 - i for i in range(len(ids))]))
        return samples


@pytest.mark.parametrize("reflect", [True, False])
def test_a_refinement_takes_the_place_of_the_failed_correction(tokenizer, environment, reflect):
    told = REFLECTION if reflect else None
    forced = REFLECTION_OPENER if reflect else ""
    wrong = act("gone.txt", told).removeprefix(forced)
    right = act("oak.txt", told).removeprefix(forced)
    policy = Scripted(tokenizer, act("oak.csv"), wrong, right, wrong)
    failed = run(policy, environment, [START], reflect=reflect, whole=False)
    assert not failed[0].success
    asked = len(policy.prompts)
    groups, metrics = join_refinements([failed], policy, environment, attempts=2, reflect=reflect)
    assert metrics == {"refinement/count": 2, "refinement/success": 0.5}
    # Sampled behind everything, the last observation included.
    seen = tokenizer.decode(policy.prompts[asked])
    assert seen.count("gone.txt") >= 2
    assert failed[0].turns[1].observation.text in seen
    # Trained as the correction of the first failure.
    (original, refined, worse) = groups[0]
    assert (refined.success, worse.success) == (True, False)
    assert refined.origin == "refinement"
    assert original == failed[0]
    whole = tokenizer.decode(refined.tokens.input_ids)
    assert "gone.txt" not in whole
    assert "oak.csv" in whole
    direct = Scripted(tokenizer, act("oak.csv"), right)
    expected = run(direct, environment, [START], reflect=reflect, whole=False)[0]
    assert refined.tokens.input_ids == expected.tokens.input_ids
    assert [t.text for t in refined.turns] == [t.text for t in expected.turns]
    # The first try is context: only the refinement is trained.
    trained = [i for i, k in enumerate(refined.tokens.segment_ids) if k in (1, 3)]
    first = min(trained)
    assert trained == list(range(first, len(refined.tokens)))
    assert refined.tokens.segment_ids[first:] == expected.tokens.segment_ids[first:]
    assert refined.tokens.log_probs[first:] == expected.tokens.log_probs[first:]


def test_only_groups_without_a_success_are_refined(tokenizer, environment):
    wrong = act("gone.txt", REFLECTION).removeprefix(REFLECTION_OPENER)
    other = act("pine.txt")  # works, and is not what was asked: nothing to see
    policy = Scripted(tokenizer, act("oak.csv"), act("oak.txt"), wrong)
    tried = run(policy, environment, [START] * 2, reflect=True, whole=False)
    assert [t.success for t in tried] == [False, True]
    policy = Scripted(tokenizer, other)
    wrong_file = run(policy, environment, [START], reflect=True, whole=False)
    groups = [tried, wrong_file]
    found, metrics = join_refinements(groups, policy, environment, attempts=3, reflect=True)
    assert found == groups
    assert metrics == {"refinement/count": 0, "refinement/success": 0.0}


def test_the_shaped_ratio():
    log_probs = torch.tensor([-8.0, -2.3, -0.01], dtype=torch.float64, requires_grad=True)
    p = log_probs.exp()
    (p / (p + 0.1)).sum().backward()
    torch.testing.assert_close(shaped_slope(log_probs.detach(), 0.1), log_probs.grad)


def test_refinements_are_trained_by_their_shaped_ratio(model):
    failed = [trajectory(False, *LONG, seed=i) for i in range(3)]
    refined = replace(trajectory(True, [(R, 4), (A, 2)], seed=9), origin="refinement")
    setting = config(group_size=3, beta=0.0, refinement_gamma=0.02, reward=RewardConfig(eta=0.0))
    (ours,), metrics = gradients(model, setting, [*failed, refined], [0] * 4)
    assert metrics["success"] == 0.0
    batch = collate([t.tokens for t in failed], with_old_log_probs=True)
    a = -0.25
    ratio = (plain_log_probs(model, batch) - batch.old_log_probs).exp()[batch.loss_mask]
    policy_part = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
    batch = collate([refined.tokens])
    p = plain_log_probs(model, batch)[batch.loss_mask].exp()
    shaped_part = -(0.75 * p / (p + 0.02)).sum()
    assert_gradient(model, (policy_part + shaped_part) / (27 + 6), ours)


# --- the update itself ----------------------------------------------------------------------------


class Stepping(Run):
    """A run that keeps the weights and the gradient of every epoch."""

    def update(self):
        self.weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
        return super().update()


def test_every_epoch_is_clipped_against_the_sampler_and_kl_is_to_the_start(
    model, tokenizer, tmp_path
):
    trajectories = [trajectory(i == 0, *LONG, seed=i) for i in range(4)]
    optim = OptimConfig(lr=3e-3, warmup_steps=0)
    setting = config(group_size=4, epochs=3, beta=0.2, reward=RewardConfig(eta=0.0), optim=optim)
    start = copy.deepcopy(model)
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    with torch.no_grad():  # the sampler was this model
        old = plain_log_probs(start, batch).float()
    for t, begin in zip(trajectories, batch.cu_seqlens.tolist(), strict=False):
        t.tokens.log_probs[1:] = old[begin : begin + len(t.tokens) - 1].tolist()
    with Stepping(tmp_path, setting, model, tokenizer, optim, 9) as training:
        training.weights, training.gradients = [], []
        update(training, Learner(model, setting), trajectories)
    a = torch.tensor([0.75, -0.25, -0.25, -0.25]).repeat_interleave(batch.cu_seqlens.diff())
    assert len(training.gradients) == 3
    for weights, ours in zip(training.weights, training.gradients, strict=True):
        now = copy.deepcopy(start)
        now.load_state_dict(weights, strict=False)
        log_probs = plain_log_probs(now, batch)
        ratio = (log_probs - old).exp()
        back = old - log_probs
        kl = back.exp() - back - 1
        loss = (0.2 * kl - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a))[batch.loss_mask]
        assert_gradient(now, loss.mean(), ours)
    assert (ratio[batch.loss_mask] - 1).abs().max() > 0.05


EVERYTHING = OptionsConfig(
    clip_target=0.5,
    step_weight=0.5,
    demonstration_weight=0.1,
    penalty=0.2,
    keep=3,
    replay=6,
    repeat_after=2,
    refinements=1,
)


class Interrupted(Exception):
    pass


def test_with_every_option_a_resumed_run_is_the_uninterrupted_one(
    base, tmp_path, environment, monkeypatch
):
    def start(out):
        setting = rl_config(
            base,
            out,
            steps=4,
            options=EVERYTHING,
            zero_variance="resample",
            resample_rounds=1,
            lora=LoraSettings(rank=2),
            reward=RewardConfig(alpha=0.5),
        )
        run_rl(setting, environment)

    start(tmp_path / "whole")
    expected = metrics_of(tmp_path / "whole")
    for name in (
        "groups/resampled",
        "sampled/success",
        "clip_bounds/share",
        "step_advantage/compared",
        "demonstration/count",
        "penalty/length",
        "down_sampling/kept",
        "replay/stored",
        "refinement/count",
        "verifier/answer",
    ):
        assert all(math.isfinite(line[name]) for line in expected), name
    assert expected[-1]["replay/stored"] > 0
    assert sum(line["demonstration/count"] for line in expected) > 0
    assert (
        len(state_of(tmp_path / "whole")["ranks"][0]["extra"]["replay"])
        == expected[-1]["replay/stored"]
    )
    finish = Run.finish_step

    def stop(self, save_every):
        if self.step == 3:
            raise Interrupted
        finish(self, save_every)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_step", stop)
        with pytest.raises(Interrupted):
            start(tmp_path / "out")
    start(tmp_path / "out")
    assert metrics_of(tmp_path / "out") == expected
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "whole"))
