"""Losses of packed trajectories and the update of ReGRPO, against plain torch in fp64."""

import math
from dataclasses import replace

import pytest
import torch

from regrpo.advantages import advantages_of
from regrpo.collect import sample_starts
from regrpo.config import LoraSettings, OptimConfig, RewardConfig, TrainConfig
from regrpo.learner import Learner
from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import head, hidden_states, load_model
from regrpo.packing import collate
from regrpo.rl import update
from regrpo.rollout import Trajectory, run
from regrpo.sampling import LocalPolicy
from regrpo.segments import TokenizedTrajectory
from regrpo.sft import NLL
from regrpo.small_model import build_model
from regrpo.trainer import Run
from regrpo.trajectory import Start
from regrpo_kernels import Objective, Segment

KINDS = (Segment.CONTEXT, Segment.ACTION, Segment.OBSERVATION, Segment.REFLECTION)


def random_trajectories(count, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        row = TokenizedTrajectory()
        row.extend([5, 6, 7], Segment.CONTEXT)
        for kind in torch.randint(0, 4, (4,), generator=generator).tolist():
            ids = torch.randint(5, vocabulary, (3,), generator=generator).tolist()
            trained = kind in (Segment.ACTION, Segment.REFLECTION)
            log_probs = (-torch.rand(3, generator=generator) - 3).tolist() if trained else [0.0] * 3
            row.extend(ids, KINDS[kind], log_probs)
        row.extend([8], Segment.ACTION, [-3.0])
        rows.append(row)
    return rows


@pytest.fixture
def batch(tokenizer):
    return collate(random_trajectories(6, len(tokenizer)), with_old_log_probs=True)


def plain_log_probs(model, batch, temperature=1.0):
    """In fp64 over all positions, one sequence at a time."""
    weight, _ = head(model)
    logits = hidden_states(model, batch).double() @ weight.double().T / temperature
    labels = batch.labels.clamp(min=0)
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def test_nll_is_the_mean_over_trained_tokens_with_its_gradient(model, batch):
    count = batch.loss_mask.sum()
    loss = policy_loss(hidden_states(model, batch), *head(model), batch, NLL, count).loss
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected = -(plain_log_probs(model, batch) * batch.loss_mask).sum() / count
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_packed_log_probs_are_zero_off_the_mask(model, batch):
    hidden = hidden_states(model, batch)
    values = packed_log_probs(hidden, *head(model), batch, 0.8)
    expected = plain_log_probs(model, batch, 0.8) * batch.loss_mask
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert not values.requires_grad


def test_untrained_positions_never_reach_the_loss(model, batch):
    count = batch.loss_mask.sum()
    hidden = hidden_states(model, batch).detach()
    clean = policy_loss(hidden, *head(model), batch, NLL, count).loss
    hidden[~batch.loss_mask] = math.nan
    assert torch.equal(policy_loss(hidden, *head(model), batch, NLL, count).loss, clean)


@pytest.fixture(scope="module")
def saved_model(tokenizer, tmp_path_factory):
    """The folder of a random model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = build_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_for(folder, tmp_path, **kwargs):
    defaults = {"states": 4, "group_size": 3, "max_new_tokens": 12, "steps": 2, "beta": 0.05}
    return TrainConfig(model=folder, out=str(tmp_path / "out"), **{**defaults, **kwargs})


@pytest.fixture
def sampled(saved_model, tokenizer, environment, tmp_path):
    """Trajectories of whole groups from a model, with made-up successes so that groups differ."""

    def make(**kwargs):
        config = config_for(saved_model, tmp_path, **kwargs)
        torch.manual_seed(0)
        model = load_model(saved_model, lora_rank=config.lora.rank).eval()
        policy = LocalPolicy(
            model, tokenizer, temperature=config.temperature, max_new_tokens=config.max_new_tokens
        )
        starts = sample_starts(config, environment, 0)
        groups = [s for s in starts for _ in range(config.group_size)]
        trajectories = run(policy, environment, groups, reflect=config.reflect, whole=False)
        for index, trajectory in enumerate(trajectories):
            trajectory.success = index % config.group_size == 0
        return config, model, trajectories

    return make


class Recorder(Run):
    """A run that keeps the gradient of each update."""

    def update(self):
        self.gradients = {
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
        }
        return super().update()


@pytest.mark.parametrize(
    "mode",
    ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"],
)
def test_the_gradient_is_the_same_for_any_split(mode, sampled, tokenizer, tmp_path):
    config, model, trajectories = sampled(loss_agg_mode=mode)
    longest = max(len(t.tokens) for t in trajectories)
    total = sum(len(t.tokens) for t in trajectories)
    results = []
    for budget in (total, longest, 2 * longest + 7):
        config = config_for(
            config.model, tmp_path / str(budget), loss_agg_mode=mode, batch_tokens=budget
        )
        model = load_model(config.model).eval()
        learner = Learner(model, config)
        with torch.no_grad():  # away from the reference, so that the KL has a gradient
            for parameter in model.parameters():
                parameter.mul_(1.05)
        with Recorder(config.out, config, model, tokenizer, OptimConfig(), 2) as training:
            metrics = update(training, learner, trajectories)
            results.append((training.gradients, metrics))
    (whole, expected), *others = results
    # And it is the objective's own mean over the batch, not a multiple of it.
    model = load_model(config.model).eval()
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    learner = Learner(model, config)
    batch = replace(
        batch,
        advantages=advantages_of(trajectories, batch, config)[0].token_advantages,
        ref_log_probs=learner.reference_log_probs(batch),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    hidden = hidden_states(model, batch)
    policy_loss(hidden, *head(model), batch, learner.objective, None).loss.backward()
    own = {n: p.grad for n, p in model.named_parameters()}
    others.append((own, expected))
    assert expected["kl"] > 0
    for gradients, metrics in others:
        assert set(gradients) == set(whole)
        for name, value in whole.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-6, msg=name)
        for name in set(expected) - {"lr"}:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_one_on_the_first_epoch(rank, temperature, sampled, tokenizer):
    config, model, trajectories = sampled(temperature=temperature, lora=LoraSettings(rank=rank))
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    now = packed_log_probs(hidden_states(model, batch), *head(model), batch, temperature)
    torch.testing.assert_close(now, batch.old_log_probs, rtol=1e-4, atol=1e-4)
    learner = Learner(model, config)
    reference = learner.reference_log_probs(batch)
    torch.testing.assert_close(reference, now, rtol=1e-6, atol=1e-6)
    with Run(config.out, config, model, tokenizer, config.optim, 2) as training:
        metrics = update(training, learner, trajectories)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    # The policy has moved on, the reference has not.
    moved = packed_log_probs(hidden_states(model, batch), *head(model), batch, temperature)
    assert not torch.equal(moved, now)
    assert torch.equal(learner.reference_log_probs(batch), reference)
    assert torch.equal(
        packed_log_probs(hidden_states(model, batch), *head(model), batch, temperature), moved
    )


def test_the_reference_of_a_trained_adapter_is_that_adapter(saved_model, batch, tmp_path):
    """Not the model under it: the KL is to where the run starts."""
    adapted = load_model(saved_model, lora_rank=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    model = load_model(str(tmp_path / "adapter"))
    learner = Learner(model, config_for(saved_model, tmp_path))
    with torch.no_grad():
        hidden = hidden_states(adapted, batch)
    start = packed_log_probs(hidden, *head(adapted), batch, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    torch.testing.assert_close(learner.reference_log_probs(batch), start)


def test_without_kl_there_is_no_reference(saved_model, batch, tmp_path):
    learner = Learner(load_model(saved_model), config_for(saved_model, tmp_path, beta=0.0))
    assert learner.reference_log_probs(batch) is None


def finished(task, success, reflection, action=4):
    """A trajectory with so many reflection tokens."""
    trajectory = Trajectory(Start(task, ()), success=success, done=True)
    trajectory.tokens.extend([5] * 6, Segment.CONTEXT)
    trajectory.tokens.extend([6] * reflection, Segment.REFLECTION, [-1.0] * reflection)
    trajectory.tokens.extend([7] * action, Segment.ACTION, [-1.0] * action)
    trajectory.tokens.extend([8] * 3, Segment.OBSERVATION)
    return trajectory


def rewards_of(trajectories, saved_model, tmp_path, group_size, **reward):
    config = config_for(saved_model, tmp_path, group_size=group_size, reward=RewardConfig(**reward))
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)
    return batch, advantages_of(trajectories, batch, config)[0]


def test_reward_is_success_minus_the_reflection_cost(tasks, saved_model, tmp_path):
    made = [finished(tasks[0], s, n) for s, n in ((True, 0), (True, 50), (False, 0), (False, 20))]
    batch, result = rewards_of(
        made, saved_model, tmp_path, 2, lambda_exec=2.0, eta=0.5, tokens_per_cost=10.0
    )
    assert result.reflection_tokens.tolist() == [0, 50, 0, 20]
    assert result.rewards.tolist() == pytest.approx([2.0, 2.0 - 2.5, 0.0, -1.0])
    # A = R - mean, clipped to [-1, 1].
    assert result.advantages.tolist() == pytest.approx([1.0, -1.0, 0.5, -0.5])
    # Each trained token carries its sequence's advantage, on the position that predicts it.
    bounds = batch.cu_seqlens.tolist()
    for row, advantage in enumerate(result.advantages.tolist()):
        part = slice(bounds[row], bounds[row + 1])
        mask = batch.loss_mask[part]
        assert result.token_advantages[part][mask].tolist() == pytest.approx(
            [advantage] * mask.sum()
        )
    assert torch.equal(result.loss_mask, batch.loss_mask)


def test_a_group_without_variance_has_advantage_zero_and_no_gradient(tasks, saved_model, tmp_path):
    made = [finished(tasks[0], True, 7)] * 3 + [finished(tasks[0], s, 7) for s in (1, 0, 0)]
    _, result = rewards_of(made, saved_model, tmp_path, 3)
    assert result.advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert result.advantages[3:].abs().min() > 0
    model = load_model(saved_model)
    first = collate([t.tokens for t in made[:3]], with_old_log_probs=True)
    first = replace(first, advantages=result.token_advantages[: len(first.labels)])
    out = policy_loss(
        hidden_states(model, first), *head(model), first, Objective(policy="clip"), 12
    )
    out.loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_updates_raise_what_succeeded_and_lower_what_failed(sampled, tokenizer):
    config, model, trajectories = sampled(
        beta=0.0, epochs=4, optim=OptimConfig(lr=3e-3, warmup_steps=0)
    )
    batch = collate([t.tokens for t in trajectories], with_old_log_probs=True)

    def mean_log_prob(success):
        values = packed_log_probs(hidden_states(model, batch), *head(model), batch, 1.0)
        bounds = batch.cu_seqlens.tolist()
        rows = [i for i, t in enumerate(trajectories) if t.success == success]
        picked = [values[bounds[i] : bounds[i + 1]].sum() for i in rows]
        return torch.stack(picked).mean().item()

    before = mean_log_prob(True), mean_log_prob(False)
    with Run(config.out, config, model, tokenizer, config.optim, 2) as training:
        metrics = update(training, Learner(model, config), trajectories)
    after = mean_log_prob(True), mean_log_prob(False)
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert metrics["ratio/max"] > 1 > metrics["ratio/min"]
    assert metrics["clip_ratio/region_mean"] > 0  # of the last epoch
