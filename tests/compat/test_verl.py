"""verl's policy losses on our objective: against fp64 restatements of verl's formulas."""

import pytest
import torch

from regrpo_kernels.compat import verl as ours


class Config(dict):
    """The options that verl's ActorConfig has, read as verl reads them."""

    def __getattr__(self, name):
        return self[name]


def config(**changes):
    options = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": None,
        "clip_ratio_c": 3.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "global_batch_info": {},
    }
    return Config({**options, **changes})


def batch():
    g = torch.Generator().manual_seed(1)
    old = -torch.rand(4, 6, generator=g) * 3
    log_prob = old + 0.8 * torch.randn(4, 6, generator=g)
    advantages = torch.randn(4, 1, generator=g).expand(4, 6).clone()
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 0]).unsqueeze(-1)
    weights = torch.rand(4, 6, generator=g) + 0.2
    return old, log_prob, advantages, mask, weights


def token_losses64(policy, old, lp, a, m, low=0.2, high=0.2, c=3.0):
    d = lp - old
    if policy == "gspo":
        mean = (d * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp(min=1)
        d = lp - lp.detach() + mean.detach()
    ratio = d.exp()
    clip = ratio.clamp(1 - low, 1 + high)
    if policy == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
    if policy == "cispo":
        return -clip.detach() * a * lp
    loss = torch.maximum(-a * ratio, -a * clip)
    if policy == "clip":
        loss = torch.where(a < 0, torch.minimum(loss, -a * c), loss)
    return loss


def aggregate64(
    loss, m, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, scale=None
):
    loss = loss * m
    sequences = (m.sum(-1) > 0).sum() if global_batch_size is None else global_batch_size
    if mode == "token-mean":
        return loss.sum() / (m.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    if mode == "token-sum":
        return loss.sum() * dp_size
    if mode == "seq-mean-token-mean":
        return (loss.sum(-1) / m.sum(-1).clamp(min=1)).sum() / sequences * dp_size
    total = loss.sum() / sequences * dp_size
    return total / (scale or m.shape[-1]) if mode == "seq-mean-token-sum-norm" else total


BATCHES = [
    {},
    {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9, "loss_scale_factor": 20},
]


@pytest.mark.parametrize("info", BATCHES, ids=["local", "global"])
@pytest.mark.parametrize("mode", ours.AGG_MODES)
@pytest.mark.parametrize("policy", ["clip", "gspo", "sapo", "cispo"])
def test_policy_losses(policy, mode, info):
    old, log_prob, a, mask, weights = batch()
    exact = log_prob.double().requires_grad_()
    token = token_losses64(policy, old.double(), exact, a.double(), mask.double())
    agg = "seq-mean-token-mean" if policy == "sapo" else mode
    named = {("scale" if k == "loss_scale_factor" else k): v for k, v in info.items()}
    loss = aggregate64(token * weights.double(), mask.double(), agg, **named)
    loss.backward()

    dirty = old.masked_fill(~mask, torch.nan)
    got_lp = log_prob.clone().requires_grad_()
    got, metrics = ours.policy_loss_fn(policy)(
        old_log_prob=dirty,
        log_prob=got_lp,
        advantages=a,
        response_mask=mask,
        loss_agg_mode=mode,
        config=config(global_batch_info=info),
        rollout_is_weights=weights,
    )
    got.backward()
    torch.testing.assert_close(got.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_lp.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    m, d = mask.double(), (log_prob - old).double()
    assert metrics["actor/ppo_kl"] == pytest.approx(float((-d * m).sum() / m.sum()), abs=1e-6)


def test_clip_fractions():
    old = torch.zeros(1, 5)
    log_prob = torch.tensor([[0.5, -0.5, 2.0, 0.5, 0.0]])
    a = torch.tensor([[1.0, -1.0, -1.0, -1.0, 1.0]])
    mask = torch.ones(1, 5)
    _, metrics = ours.policy_loss("clip", old, log_prob, a, mask, config=config())
    assert metrics["actor/pg_clipfrac"] == pytest.approx(0.4)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(0.2)
    _, metrics = ours.policy_loss("cispo", old, log_prob, a, mask, config=config())
    assert metrics["actor/pg_clipfrac"] == pytest.approx(0.8)
    _, metrics = ours.policy_loss("sapo", old, log_prob, a, mask, config=config())
    assert metrics["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (2, 2, 3, 6)], ids=str)
def test_log_probs(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.randint(0, 6, shape[:-1])
    got = ours.logprobs_from_logits(logits, labels)
    exact = logits.detach().double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "config"),
        ({"loss_agg_mode": "sum"}, "loss_agg_mode"),
        ({"advantages": torch.ones(4)}, "advantages"),
        ({"config": config(clip_ratio_c=1.1)}, "clip_ratio_c"),
        ({"config": config(global_batch_info={"dp_size": 2})}, "batch_num_tokens"),
        ({"config": config(global_batch_info={"rank": 2})}, "rank"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_named(change, message):
    old, log_prob, a, mask, _ = batch()
    call = {"old_log_prob": old, "log_prob": log_prob, "advantages": a, "response_mask": mask}
    with pytest.raises(ValueError, match=message):
        ours.policy_loss("clip", **{**call, "config": config(), **change})


# --- the installed peer ---------------------------------------------------------------------------


def test_registered_losses_are_verls():
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    functional = pytest.importorskip("verl.utils.torch_functional")
    from verl.workers.config import ActorConfig

    theirs_of_logits = functional.logprobs_from_logits
    names = ours.register()
    old, log_prob, a, mask, weights = batch()
    options = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    for name, theirs in zip(names, ("vanilla", "gspo", "sapo", "cispo"), strict=True):
        for mode in ours.AGG_MODES:
            arguments = (old, log_prob, a, mask, mode, options, weights)
            got = core.get_policy_loss_fn(name)(*arguments)
            expected = core.get_policy_loss_fn(theirs)(*arguments)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
            assert got[1] == pytest.approx(expected[1], abs=1e-5)
    logits, labels = torch.randn(2, 3, 6), torch.randint(0, 6, (2, 3))
    assert functional.logprobs_from_logits is ours.logprobs_from_logits
    torch.testing.assert_close(
        functional.logprobs_from_logits(logits, labels), theirs_of_logits(logits, labels)
    )
    with pytest.raises(ValueError, match="already"):
        ours.register()
