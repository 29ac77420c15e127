"""`ratio_level="sequence"` against fp64: packed, padded, in place, and from hidden states."""

import pytest
import torch
from oracle import FAR, assert_gradient, far_logits, grpo_loss64, log_probs64
from test_grpo_loss import make_batch, run, token_mean

from regrpo_kernels import Objective, grpo_loss, linear_grpo_loss, linear_head

LENGTHS = [14, 0, 1, 9, 4]  # an empty sequence, and one without trained tokens (the last)
SEQUENCES = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def packed_batch(vocab=63, dtype=torch.float32, **scaling):
    batch = make_batch(sum(LENGTHS), vocab, dtype, **scaling)
    batch["loss_mask"][-4:] = False
    batch["loss_mask"][14] = True
    batch["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    # some sequences inside the clip interval, some outside
    batch["old_log_probs"] += torch.tensor([0.0, 0.0, -0.4, 0.3, 0.0])[SEQUENCES]
    return batch


def expect(batch, **options):
    names = ("advantages", "old_log_probs", "ref_log_probs")
    return grpo_loss64(
        batch["logits"],
        batch["labels"],
        token_mean(batch["loss_mask"]),
        *[batch[name] for name in names],
        SEQUENCES,
        **options,
    )


def check(out, gradient, batch, dtype, atol=0.0, **options):
    loss, expected = expect(batch, **options)
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss, rtol=3e-6, atol=3e-6)
    assert_gradient(gradient, expected, dtype, atol)


@pytest.fixture(params=[False, True], ids=["fresh", "inplace"])
def inplace(request, implementation):
    if request.param and implementation.impl == "reference":
        pytest.skip("the reference has no in-place form")
    return request.param


@pytest.mark.parametrize("vocab", [63, 507])
def test_loss_and_gradient_match_fp64(implementation, dtype, vocab, inplace, poisoned_empty):
    batch = packed_batch(vocab, dtype)
    objective = Objective(ratio_level="sequence", beta=0.05)
    out, gradient = run(implementation, **batch, objective=objective, inplace=inplace)
    check(out, gradient, batch, dtype, beta=0.05)
    ratio = out.metrics["ratio/max"]
    assert torch.isfinite(ratio)
    assert out.metrics["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo", "reinforce", "nll"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_every_policy_and_kl_estimator(implementation, policy, kl_estimator):
    options = {"policy": policy, "kl_estimator": kl_estimator, "beta": 0.1, "temperature": 0.8}
    batch = packed_batch(temperature=0.8)
    objective = Objective(ratio_level="sequence", **options)
    check(*run(implementation, **batch, objective=objective), batch, torch.float32, **options)


@pytest.mark.parametrize(
    "options",
    [{"delta": 1.05}, {"entropy_coef": 0.2}, {"softcap": 6.0, "entropy_coef": 0.1}],
    ids=lambda o: "-".join(o),
)
def test_cap_entropy_bonus_and_softcap(implementation, options, inplace):
    batch = packed_batch(**{k: v for k, v in options.items() if k == "softcap"})
    objective = Objective(ratio_level="sequence", **options)
    out = run(implementation, **batch, objective=objective, inplace=inplace)
    check(*out, batch, torch.float32, 2e-7 if "softcap" in options else 0.0, **options)


@pytest.mark.parametrize("spread", [False, True], ids=["one-hot", "spread"])
@pytest.mark.parametrize("offset", FAR)
def test_far_from_zero(implementation, offset, spread, inplace):
    """Probabilities must not come from a rounded lse."""
    for dtype in (torch.float32, torch.bfloat16):
        batch = packed_batch(507, dtype)
        batch["logits"], temperature = far_logits(batch["logits"].shape, offset, dtype)
        batch["labels"] = batch["logits"].argmax(-1)
        options = {"temperature": temperature if spread else 1.0, "entropy_coef": 0.1, "beta": 0.1}
        log_probs = log_probs64(batch["logits"], batch["labels"], options["temperature"])[0].float()
        batch["old_log_probs"] = log_probs + 0.05 * torch.randn(len(SEQUENCES))
        batch["ref_log_probs"] = log_probs + 0.3 * torch.randn(len(SEQUENCES))
        objective = Objective(ratio_level="sequence", **options)
        _, gradient = run(implementation, **batch, objective=objective, inplace=inplace)
        # autograd of the reference keeps log-probs in fp32
        atol = 1e-3 / temperature if implementation.impl == "reference" and spread else 0.0
        assert_gradient(gradient, expect(batch, **options)[1], dtype, atol)


def test_packed_equals_padded(implementation):
    objective = Objective(ratio_level="sequence", beta=0.1, loss_agg_mode="seq-mean-token-mean")
    batch = packed_batch()
    out, gradient = run(implementation, **batch, objective=objective)
    inside = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded = {}
    for name, packed in batch.items():
        if name != "cu_seqlens":
            fill = {torch.int64: -100, torch.bool: True}.get(packed.dtype, float("nan"))
            padded[name] = torch.full((*inside.shape, *packed.shape[1:]), fill, dtype=packed.dtype)
            padded[name][inside] = packed
    padded_out, padded_gradient = run(implementation, **padded, objective=objective)
    torch.testing.assert_close(padded_out.loss, out.loss)
    torch.testing.assert_close(padded_gradient[inside], gradient)
    assert (padded_gradient[~inside] == 0).all()


def test_without_old_log_probs_the_ratio_is_one(implementation):
    batch = packed_batch() | {"old_log_probs": None, "ref_log_probs": None}
    objective = Objective(ratio_level="sequence")
    out, gradient = run(implementation, **batch, objective=objective)
    check(out, gradient, batch, torch.float32)
    assert out.metrics["ratio/min"] == out.metrics["ratio/max"] == 1


def test_far_ratios_are_clamped_token_by_token(implementation):
    batch = packed_batch()
    batch["old_log_probs"][3] += 1000.0
    batch["old_log_probs"][18] -= 1000.0
    objective = Objective(ratio_level="sequence", policy="sapo")
    check(*run(implementation, **batch, objective=objective), batch, torch.float32, policy="sapo")


def test_a_forbidden_token_pushes_nothing_and_the_rest_stays_finite(implementation):
    batch = packed_batch()
    batch["loss_mask"][:14] = True
    batch["logits"][7, batch["labels"][7]] = -torch.inf
    out, gradient = run(implementation, **batch, objective=Objective(ratio_level="sequence"))
    assert out.log_probs[7] == -torch.inf
    assert torch.isfinite(out.loss)
    assert torch.isfinite(gradient).all()
    assert (gradient[7] == 0).all()
    # it counts as a log-ratio of -20 in its sequence's mean
    batch["old_log_probs"][7] = 0.0
    log_ratios = out.log_probs.cpu()[:14] - batch["old_log_probs"][:14]
    mean = log_ratios.double().clamp(-20, 20).mean()
    ratio = 13 * torch.exp(mean)
    trained = batch["loss_mask"][14:]
    rest = (out.log_probs.cpu()[14:] - batch["old_log_probs"][14:]).double()
    for i in range(1, len(LENGTHS)):
        kept = trained & (SEQUENCES[14:] == i)
        if kept.any():
            ratio = ratio + kept.sum() * rest[kept].mean().exp()
    expected = ratio / batch["loss_mask"].sum()
    torch.testing.assert_close(
        out.metrics["ratio/mean"].cpu().double(), expected, rtol=1e-5, atol=0
    )


def test_packed_needs_cu_seqlens():
    batch = packed_batch()
    del batch["cu_seqlens"]
    with pytest.raises(ValueError, match="cu_seqlens is needed"):
        grpo_loss(**batch, objective=Objective(ratio_level="sequence"))


@pytest.mark.parametrize("needs", ["both", "hidden", "none"])
@pytest.mark.parametrize("chunk_bytes", [1 << 11, 1 << 30], ids=["chunks", "one-chunk"])
def test_from_hidden_states(implementation, chunk_bytes, needs, monkeypatch):
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", {"cpu": chunk_bytes, "cuda": chunk_bytes})
    device = implementation.device
    objective = Objective(ratio_level="sequence", beta=0.1)
    weight = torch.randn(63, 12, device=device)
    hidden = torch.randn(sum(LENGTHS), 12, device=device)
    batch = {k: v.to(device) for k, v in packed_batch().items() if k != "logits"}
    batch["advantages"] = batch["advantages"].masked_fill(SEQUENCES.to(device) == 3, 0.0)
    found = []
    for linear in (False, True):
        h = hidden.clone().requires_grad_(needs != "none")
        w = weight.clone().requires_grad_(needs == "both")
        options = {"objective": objective, "impl": implementation.impl}
        if linear:
            out = linear_grpo_loss(h, w, **batch, **options)
        else:
            out = grpo_loss(h @ w.T, **batch, **options)
        if needs != "none":
            out.loss.backward()
        found.append((out.loss.detach(), out.log_probs, out.metrics, h.grad, w.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_rows_without_a_gradient_leave_the_matmuls(ratio_level, monkeypatch):
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", {"cpu": 1 << 12})
    multiplied = []
    product = linear_head._add_product
    monkeypatch.setattr(
        linear_head,
        "_add_product",
        lambda t, a, b, add: (multiplied.append(len(b)), product(t, a, b, add)),
    )
    batch = packed_batch()
    del batch["logits"], batch["ref_log_probs"], batch["old_log_probs"]
    batch["loss_mask"][:] = True
    batch["advantages"] = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0])
    hidden = torch.randn(sum(LENGTHS), 12, requires_grad=True)
    weight = torch.randn(63, 12, requires_grad=True)
    objective = Objective(ratio_level=ratio_level)
    linear_grpo_loss(hidden, weight, **batch, objective=objective).loss.backward()
    assert sum(multiplied) == 14 + 4
    assert ((hidden.grad != 0).any(1) == (batch["advantages"][SEQUENCES] != 0)).all()
