"""grpo_loss against fp64: loss and gradient, every implementation, dtype and ragged shape."""

import pytest
import torch
from oracle import assert_gradient, grpo_loss64, log_probs64

from regrpo_kernels import Objective, grpo_loss

SHAPES = [(0, 63), (1, 1), (3, 63), (257, 63), (3, 507), (2, 32000), (1, 151936)]


def make_batch(tokens, vocab, dtype=torch.float32, spread=3.0, **scaling):
    """Random logits with old and reference log-probs a little away from the current ones."""
    logits = (torch.randn(tokens, vocab) * spread).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    log_probs = log_probs64(logits, labels, **scaling)[0].float()
    return {
        "logits": logits,
        "labels": labels,
        "advantages": torch.randn(tokens),
        "old_log_probs": log_probs + 0.3 * torch.randn(tokens),
        "ref_log_probs": log_probs + 0.5 * torch.randn(tokens),
        "loss_mask": torch.rand(tokens) < 0.7,
    }


def run(implementation, logits, labels, advantages, **arguments):
    """`(output, gradient of the logits)` on the implementation's device."""
    impl, device, _ = implementation
    move = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    x = logits.detach().clone().to(device).requires_grad_()
    advantages = None if advantages is None else advantages.to(device)
    out = grpo_loss(x, labels.to(device), advantages, impl=impl, **move)
    out.loss.backward()
    return out, x.grad.cpu()


def expect(batch, weights, **options):
    return grpo_loss64(
        batch["logits"],
        batch["labels"],
        weights,
        batch["advantages"],
        batch["old_log_probs"],
        batch["ref_log_probs"],
        **options,
    )


def token_mean(mask):
    return mask / mask.sum().clamp(min=1)


@pytest.fixture(params=[False, True], ids=["fresh", "inplace"])
def inplace(request, implementation):
    if request.param and implementation.impl == "reference":
        pytest.skip("the reference has no in-place form")
    return request.param


@pytest.mark.parametrize("vocab", [5000, 6144])
@pytest.mark.parametrize(
    "rows",
    ["rising", "falling", "one block far up", "forbidden block first", "far below 0", "huge"],
)
def test_rows_whose_maximum_moves(implementation, dtype, inplace, vocab, rows):
    """Blocks of a row are summed relative to a reference that may move from block to block."""
    batch = make_batch(3, vocab, dtype)
    logits = batch["logits"].float()
    if rows in ("rising", "falling"):
        ramp = torch.linspace(-150, 150, vocab)
        logits += ramp if rows == "rising" else -ramp
    elif rows == "one block far up":
        logits[:, 2100:2110] += 90
    elif rows == "forbidden block first":
        logits[:, :4096] = -torch.inf
        batch["labels"] = batch["labels"] % 900 + 4096
    elif rows == "far below 0":
        logits -= 30000
    else:
        logits = logits * 2e3 + 6e4 if dtype == torch.float16 else logits * 1e31 + 1e32
        logits = logits.clamp(max=torch.finfo(dtype).max)
    batch["logits"] = logits.to(dtype)
    log_probs = log_probs64(batch["logits"], batch["labels"])[0].float()
    batch |= {"old_log_probs": None, "ref_log_probs": None}  # a ratio of 1: they are far from 0
    batch["loss_mask"][:] = True
    out, gradient = run(implementation, **batch, inplace=inplace)
    batch["logits"] = batch["logits"].masked_fill(batch["logits"] == -torch.inf, -40000.0)
    _, expected = expect(batch, token_mean(batch["loss_mask"]))
    torch.testing.assert_close(out.log_probs.cpu(), log_probs, rtol=2e-6, atol=2e-6)
    assert_gradient(gradient, expected, dtype, 2e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_match_fp64(implementation, dtype, shape, inplace, poisoned_empty):
    batch = make_batch(*shape, dtype)
    objective = Objective(beta=0.05)
    out, gradient = run(implementation, **batch, objective=objective, inplace=inplace)
    loss, expected = expect(batch, token_mean(batch["loss_mask"]), beta=0.05)
    # the reference sums 150,000 exponentials in fp32 without blocks
    tol = 1e-5 if implementation.impl == "reference" else 2e-6
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss, rtol=tol, atol=tol)
    assert_gradient(gradient, expected, dtype, 1e-10 if implementation.impl == "reference" else 0.0)
    assert out.log_probs.shape == batch["labels"].shape
    assert not out.log_probs.requires_grad


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo", "reinforce", "nll"])
def test_every_policy_and_kl_estimator(implementation, policy, kl_estimator):
    options = {
        "policy": policy,
        "kl_estimator": kl_estimator,
        "beta": 0.1,
        "epsilon_low": 0.1,
        "epsilon_high": 0.25,
        "sapo_tau_neg": 1.5,
        "temperature": 0.8,
    }
    batch = make_batch(40, 63, temperature=0.8)
    out, gradient = run(implementation, **batch, objective=Objective(**options))
    loss, expected = expect(batch, token_mean(batch["loss_mask"]), **options)
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss, rtol=2e-6, atol=2e-6)
    assert_gradient(gradient, expected, torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.3},
        {"delta": 1.05},
        {"entropy_coef": 0.2},
        {"softcap": 6.0},
        {"softcap": 6.0, "entropy_coef": 0.1, "temperature": 1.4},
    ],
    ids=lambda o: "-".join(o),
)
def test_cap_entropy_bonus_and_softcap(implementation, options, inplace):
    scaling = {k: v for k, v in options.items() if k in ("softcap", "temperature")}
    batch = make_batch(30, 70, **scaling)
    out, gradient = run(implementation, **batch, objective=Objective(**options), inplace=inplace)
    loss, expected = expect(batch, token_mean(batch["loss_mask"]), **options)
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss, rtol=2e-6, atol=2e-6)
    # 1 - (z / c)^2 cancels where the softcap saturates
    assert_gradient(gradient, expected, torch.float32, atol=2e-7 if scaling else 0.0)


def test_without_old_log_probs_the_ratio_is_one(implementation):
    batch = make_batch(20, 63) | {"old_log_probs": None, "ref_log_probs": None}
    out, gradient = run(implementation, **batch)
    _, expected = expect(batch, token_mean(batch["loss_mask"]))
    assert_gradient(gradient, expected, torch.float32)
    assert out.kl is None
    assert "kl" not in out.metrics
    assert out.metrics["ratio/mean"].item() == pytest.approx(1.0)


def test_masked_rows_may_hold_anything(implementation, dtype, inplace, poisoned_empty):
    batch = make_batch(9, 70, dtype)
    mask = batch["loss_mask"] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1]).bool()
    objective = Objective(beta=0.1)
    clean = run(implementation, **batch, objective=objective, inplace=inplace)
    dirty = dict(batch)
    for name in ("logits", "advantages", "old_log_probs", "ref_log_probs"):
        dirty[name] = batch[name].clone()
        dirty[name][~mask] = float("nan")
    dirty["logits"][1] = float("inf")
    dirty["labels"] = batch["labels"].clone()
    dirty["labels"][~mask] = 10**6
    dirty["labels"][4] = -100
    if implementation.impl == "reference":
        dirty["labels"] = batch["labels"]  # gathers before it masks
    out, gradient = run(implementation, **dirty, objective=objective, inplace=inplace)
    assert torch.equal(out.loss, clean[0].loss)
    assert torch.equal(gradient, clean[1])
    assert (gradient[~mask] == 0).all()
    for name, value in out.metrics.items():
        assert torch.equal(value, clean[0].metrics[name]), name
    for per_token in (out.log_probs, out.entropy, out.kl):
        assert (per_token.cpu()[~mask] == 0).all()


def test_everything_masked(implementation, inplace):
    batch = make_batch(4, 63)
    batch["loss_mask"] = torch.zeros(4)
    out, gradient = run(implementation, **batch, inplace=inplace)
    assert out.loss.item() == 0
    assert (gradient == 0).all()


def test_forbidden_tokens(implementation, inplace):
    """A label at a -inf logit: log-prob -inf, ratio 0, finite gradient, whatever the policy."""
    for policy in ("clip", "cispo", "sapo", "reinforce"):
        batch = make_batch(3, 70)
        batch["logits"][:, ::2] = -torch.inf
        batch["labels"] = torch.tensor([4, 5, 6])
        batch["advantages"] = torch.tensor([1.0, -1.0, -2.0])
        batch["old_log_probs"] = torch.tensor([-3.0, -4.0, -torch.inf])
        batch["ref_log_probs"] = torch.tensor([-3.0, -4.0, -torch.inf])
        batch["loss_mask"] = None
        objective = Objective(policy=policy, beta=0.1)
        out, gradient = run(implementation, **batch, objective=objective, inplace=inplace)
        assert torch.isfinite(gradient).all(), policy
        assert (gradient[1, ::2] == 0).all()
        assert out.log_probs[0] == -torch.inf
        assert out.metrics["ratio/min"] == 0


@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_ratio_overflow_has_a_finite_gradient(implementation, policy, shift):
    batch = make_batch(8, 63)
    batch["old_log_probs"] = batch["old_log_probs"] + shift
    batch["ref_log_probs"] = batch["ref_log_probs"] - shift
    out, gradient = run(implementation, **batch, objective=Objective(policy=policy, beta=0.1))
    assert torch.isfinite(out.loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("view", ["shifted", "vocabulary slice"])
def test_views_are_used_in_place(implementation, dtype, view, inplace):
    impl, device, _ = implementation
    base = torch.randn(3, 6, 75).to(dtype)
    take = {"shifted": lambda t: t[:, :-1], "vocabulary slice": lambda t: t[:, :, 1:72]}[view]
    labels = torch.randint(0, take(base).shape[-1], take(base).shape[:2])
    advantages = torch.randn(3)
    x = base.clone().to(device).requires_grad_()
    leaf = x.detach() if inplace else x
    viewed = take(leaf)
    if inplace:
        viewed = viewed.detach().requires_grad_()
    out = grpo_loss(viewed, labels.to(device), advantages.to(device), impl=impl, inplace=inplace)
    (gradient,) = torch.autograd.grad(out.loss, viewed if inplace else x)
    weights = torch.full(labels.shape, 1 / labels.numel()).flatten()
    _, expected = grpo_loss64(
        take(base).reshape(labels.numel(), -1),
        labels.flatten(),
        weights,
        advantages.repeat_interleave(labels.shape[1]),
    )
    rows = gradient if inplace else take(gradient)
    assert_gradient(rows.reshape(labels.numel(), -1).cpu(), expected, dtype)
    if inplace:  # what the view leaves out is untouched
        assert gradient.data_ptr() == viewed.data_ptr()
        untouched = base.clone()
        take(untouched).copy_(gradient.cpu())
        assert torch.equal(x.detach().cpu(), untouched)


def test_inplace_needs_no_second_buffer_behind_a_linear_head(implementation):
    """The gradient lands in the logits, and flows on to the layer that made them."""
    impl, device, _ = implementation
    if impl == "reference":
        pytest.skip("the reference has no in-place form")
    hidden, weight = torch.randn(12, 16, device=device), torch.randn(63, 16, device=device)
    labels = torch.randint(0, 63, (12,), device=device)
    advantages = torch.randn(12, device=device)
    gradients = []
    for inplace in (False, True):
        w = weight.clone().requires_grad_()
        logits = torch.nn.functional.linear(hidden, w)
        before = logits.detach().clone()
        out = grpo_loss(logits, labels, advantages, inplace=inplace, impl=impl)
        assert torch.equal(before, logits.detach()) is not inplace
        (3 * out.loss).backward()
        gradients.append(w.grad)
    torch.testing.assert_close(*gradients)


def test_logits_without_gradient_are_left_alone(implementation, inplace):
    impl, device, _ = implementation
    logits = torch.randn(4, 63, device=device)
    before = logits.clone()
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    out = grpo_loss(logits, labels, torch.ones(4, device=device), inplace=inplace, impl=impl)
    assert not out.loss.requires_grad
    assert torch.equal(logits, before)


def test_backward_scales_and_says_when_it_is_used_up(implementation, inplace):
    impl, device, _ = implementation
    batch = make_batch(6, 63)
    _, expected = run(implementation, **batch)
    x = batch["logits"].clone().to(device).requires_grad_()
    rest = {k: v.to(device) for k, v in batch.items() if k != "logits"}
    out = grpo_loss(x, **rest, impl=impl, inplace=inplace)
    if not inplace:
        (-2 * out.loss).backward(retain_graph=True)
        torch.testing.assert_close(x.grad.cpu(), -2 * expected)
        x.grad = None
    (0.5 * out.loss).backward()
    torch.testing.assert_close(x.grad.cpu(), 0.5 * expected)
    with pytest.raises(RuntimeError, match=r"already used|second time"):
        out.loss.backward()


def test_two_runs_give_the_same_bits(implementation, dtype):
    batch = make_batch(33, 5000, dtype)
    objective = Objective(beta=0.1, entropy_coef=0.01)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(implementation, **batch, objective=objective))
    finally:
        torch.set_num_threads(threads)
    for out, gradient in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss)
        assert torch.equal(gradient, results[0][1])


def test_metrics(implementation):
    batch = make_batch(50, 63) | {"loss_mask": torch.rand(50) < 0.5}
    out, _ = run(implementation, **batch, objective=Objective(epsilon_low=0.1, epsilon_high=0.3))
    mask = batch["loss_mask"]
    log_probs, _, entropy = log_probs64(batch["logits"], batch["labels"])
    ratio = (log_probs - batch["old_log_probs"]).exp()
    x = batch["ref_log_probs"] - log_probs
    low = (ratio < 0.9) & (batch["advantages"] < 0)
    high = (ratio > 1.3) & (batch["advantages"] > 0)
    expected = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
        "entropy": entropy,
        "kl": x.exp() - x - 1,
        "ratio/mean": ratio,
    }
    for name, value in expected.items():
        assert out.metrics[name].dim() == 0
        assert out.metrics[name].item() == pytest.approx(
            value[mask].double().mean().item(), rel=1e-5
        )
    assert out.metrics["ratio/min"].item() == pytest.approx(ratio[mask].min().item(), rel=1e-5)
    assert out.metrics["ratio/max"].item() == pytest.approx(ratio[mask].max().item(), rel=1e-5)
