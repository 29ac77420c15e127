"""The linear ops against fp64, and against the row ops on whole logits."""

import pytest
import torch
from oracle import FAR, assert_gradient, far_logits, grpo_loss64, log_probs64
from torch.library import opcheck

from regrpo_kernels import (
    Objective,
    grpo_loss,
    linear_grpo_loss,
    linear_head,
    linear_token_log_probs,
    token_log_probs,
)

H = 24
OPS = torch.ops.regrpo_kernels


@pytest.fixture(autouse=True)
def few_rows_a_chunk(monkeypatch):
    """Several chunks, and NaN wherever memory is not written."""
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", {"cpu": 1 << 13, "cuda": 1 << 13})
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_batch(tokens, vocab, dtype=torch.float32, bias=True, device="cpu"):
    batch = {
        "hidden": torch.randn(tokens, H),
        "weight": torch.randn(vocab, H) / 3,
        "bias": torch.randn(vocab) if bias else None,
    }
    batch = {k: None if v is None else v.to(device, dtype) for k, v in batch.items()}
    labels = torch.randint(vocab, (tokens,))
    labels[::5] = -100
    mask = torch.rand(tokens) < 0.7
    hidden = batch["hidden"]
    hidden[::5] = torch.nan  # never read
    log_probs = -torch.rand(tokens) * 3
    return batch, {
        "labels": labels.to(device),
        "advantages": torch.randn(tokens, device=device),
        "old_log_probs": log_probs.to(device),
        "ref_log_probs": (log_probs - 0.3 * torch.rand(tokens)).to(device),
        "loss_mask": mask.to(device),
    }


def trained(layer):
    return {k: None if v is None else v.clone().requires_grad_() for k, v in layer.items()}


def gradients(layer):
    return {k: v.grad for k, v in layer.items() if v is not None}


def exact(layer, tokens, **options):
    """`(loss, gradients)` in fp64."""
    layer = {k: None if v is None else v.cpu().double() for k, v in layer.items()}
    tokens = {k: v.cpu() for k, v in tokens.items()}
    kept = tokens["loss_mask"] & (tokens["labels"] != -100)
    hidden = layer["hidden"].masked_fill(~kept[:, None], 0.0)
    logits = hidden @ layer["weight"].T
    if layer["bias"] is not None:
        logits = logits + layer["bias"]
    loss, dlogits = grpo_loss64(
        logits,
        tokens["labels"],
        kept / max(int(kept.sum()), 1),
        tokens["advantages"],
        tokens["old_log_probs"],
        tokens["ref_log_probs"],
        **options,
    )
    found = {"hidden": dlogits @ layer["weight"], "weight": dlogits.T @ hidden}
    return loss, {**found, "bias": dlogits.sum(0)}


def assert_near(ours, expected, dtype, scale=1.0):
    step = {torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    assert ours.shape == expected.shape
    error = (ours.cpu().double() - expected).abs().max().item() if expected.numel() else 0.0
    largest = expected.abs().max().item() if expected.numel() else 0.0
    assert error <= scale * step * (largest + 1e-6), (error, largest)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("tokens", "vocab"), [(0, 63), (1, 1), (3, 507), (257, 63), (130, 507)])
def test_grpo_loss_and_gradients(implementation, dtype, tokens, vocab, bias):
    layer, batch = make_batch(tokens, vocab, dtype, bias, implementation.device)
    layer = trained(layer)
    options = {"beta": 0.1, "entropy_coef": 0.01}
    out = linear_grpo_loss(
        **layer, **batch, objective=Objective(**options), impl=implementation.impl
    )
    out.loss.backward()
    loss, expected = exact(layer, batch, **options)
    # 16-bit logits are rounded before the softmax, by a linear layer as well.
    scale = 1.0 if dtype == torch.float32 else 4.0
    assert_near(out.loss.detach(), loss, dtype, 4.0)
    for name, gradient in gradients(layer).items():
        assert gradient.dtype == dtype
        assert_near(gradient, expected[name], dtype, scale)
    masked = ~batch["loss_mask"] | (batch["labels"] == -100)
    assert (gradients(layer)["hidden"][masked] == 0).all()
    assert (out.log_probs[masked] == 0).all()


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize(("tokens", "vocab"), [(0, 63), (1, 1), (257, 63), (130, 507)])
def test_log_probs_and_gradients(implementation, dtype, tokens, vocab, return_entropy):
    layer, batch = make_batch(tokens, vocab, dtype, True, implementation.device)
    layer, labels = trained(layer), batch["labels"]
    out = linear_token_log_probs(
        **layer,
        labels=labels,
        temperature=0.7,
        softcap=5.0,
        return_entropy=return_entropy,
        impl=implementation.impl,
    )
    weights = torch.randn(2, tokens)
    value = (out.log_probs * weights[0].to(labels.device)).sum()
    if return_entropy:
        value = value + (out.entropy * weights[1].to(labels.device)).sum()
    value.backward()

    wide = {k: v.detach().cpu().double().requires_grad_() for k, v in layer.items()}
    kept = labels.cpu() != -100
    logits = wide["hidden"][kept] @ wide["weight"].T + wide["bias"]
    log_probs, lse, entropy = log_probs64(logits, labels.cpu()[kept], 0.7, 5.0)
    total = (log_probs * weights[0][kept]).sum()
    if return_entropy:
        total = total + (entropy * weights[1][kept]).sum()
    total.backward()
    scale = 1.0 if dtype == torch.float32 else 4.0
    assert_near(out.log_probs[kept.to(labels.device)].detach(), log_probs.detach(), dtype, scale)
    assert_near(out.lse[kept.to(labels.device)].detach(), lse.detach(), dtype, scale)
    for name, gradient in gradients(layer).items():
        assert_near(gradient, wide[name].grad, dtype, scale)


@pytest.mark.parametrize("offset", FAR)
def test_log_prob_gradients_far_from_zero(implementation, offset):
    """Probabilities must not come from a rounded lse. The logits are one row of the head each, so
    no matmul rounds them.
    """
    impl, device, _ = implementation
    tokens, vocab = 9, 63
    for dtype in (torch.float32, torch.bfloat16):
        logits, temperature = far_logits((tokens, vocab), offset, dtype)
        layer = {"hidden": torch.eye(tokens), "weight": logits.T}
        layer = {k: v.to(device, dtype).requires_grad_() for k, v in layer.items()}
        labels = torch.randint(0, vocab, (tokens,))
        out = linear_token_log_probs(
            **layer,
            labels=labels.to(device),
            temperature=temperature,
            return_entropy=True,
            impl=impl,
        )
        weights = torch.randn(2, tokens)
        moved = weights.to(device)
        ((out.log_probs * moved[0]).sum() + (out.entropy * moved[1]).sum()).backward()
        exact = logits.double().requires_grad_()
        log_probs, _, entropy = log_probs64(exact, labels, temperature)
        ((log_probs * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
        # autograd of the reference keeps log-probs in fp32
        atol = 1e-3 / temperature if impl == "reference" else 0.0
        assert_gradient(layer["weight"].grad, exact.grad.T, dtype, atol)


def test_padded_equals_packed():
    layer, batch = make_batch(12, 63)
    batch["advantages"] = torch.randn(3)
    objective = Objective(loss_agg_mode="seq-mean-token-mean", beta=0.1)
    packed, padded = trained(layer), trained(layer)
    bounds = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    out = linear_grpo_loss(**packed, **batch, cu_seqlens=bounds, objective=objective)
    out.loss.backward()
    shaped = {k: v.view(3, 4) if v.shape == (12,) else v for k, v in batch.items()}
    hidden = padded.pop("hidden")
    other = linear_grpo_loss(hidden.view(3, 4, H), **padded, **shaped, objective=objective)
    other.loss.backward()
    assert torch.equal(out.loss, other.loss)
    assert torch.equal(out.log_probs, other.log_probs.flatten())
    assert torch.equal(packed["hidden"].grad, hidden.grad)
    assert torch.equal(packed["weight"].grad, padded["weight"].grad)


def test_logits_and_linear_ops_agree_and_backward_runs_twice():
    layer, batch = make_batch(40, 63)
    layer["hidden"] = layer["hidden"].nan_to_num()
    linear, whole = trained(layer), trained(layer)
    out = linear_grpo_loss(**linear, **batch)
    logits = torch.nn.functional.linear(whole["hidden"], whole["weight"], whole["bias"])
    other = grpo_loss(logits, **batch)
    torch.testing.assert_close(out.loss, other.loss)
    assert out.metrics.keys() == other.metrics.keys()
    for name, value in out.metrics.items():
        torch.testing.assert_close(value, other.metrics[name])
    (3 * other.loss).backward()
    out.loss.backward(retain_graph=True)
    (2 * out.loss).backward()
    for ours, theirs in zip(gradients(linear).values(), gradients(whole).values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    rows = token_log_probs(logits.detach(), batch["labels"]).log_probs
    again = linear_token_log_probs(**layer, labels=batch["labels"]).log_probs
    torch.testing.assert_close(rows, again)


def test_a_frozen_head_gets_no_gradient_and_costs_no_matmul(monkeypatch):
    layer, batch = make_batch(40, 63)
    layer["hidden"].requires_grad_()
    made = []
    inner = linear_head.LinearHead.__init__
    monkeypatch.setattr(
        linear_head.LinearHead,
        "__init__",
        lambda self, *a: (inner(self, *a), made.append(self))[0],
    )
    linear_grpo_loss(**layer, **batch).loss.backward()
    linear_token_log_probs(**layer, labels=batch["labels"]).log_probs.sum().backward()
    assert [(h.dweight, h.dbias) for h in made] == [(None, None)] * 3
    assert layer["hidden"].grad is not None
    assert layer["weight"].grad is None


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_opcheck(impl):
    layer, batch = make_batch(9, 63)
    layer["hidden"] = layer["hidden"].nan_to_num()
    mask = batch["loss_mask"] & (batch["labels"] != -100)
    tokens = [mask, mask.float() / 9, batch["advantages"], batch["old_log_probs"], None, None]
    objective = ["clip", "k3", [0.2, 0.2, 0.0, 0.1, 0.0, 1.0, 1.05, 1.0, 0.0]]
    tensors = trained(layer).values()
    opcheck(
        OPS.linear_grpo_loss.default,
        (*tensors, batch["labels"], *tokens, *objective, [True, True, True], False, impl),
    )
    for entropy in (False, True):
        opcheck(
            OPS.linear_token_log_probs.default,
            (*trained(layer).values(), batch["labels"], 1.0, 0.0, entropy, impl),
        )


def test_compiles_without_a_graph_break():
    layer, batch = make_batch(20, 63)
    layer["hidden"] = layer["hidden"].nan_to_num()

    def loss_of(hidden, weight, bias):
        out = linear_grpo_loss(hidden, weight, bias=bias, **batch)
        rows = linear_token_log_probs(hidden, weight, batch["labels"], bias=bias)
        return out.loss + rows.log_probs.mean()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found = []
    for function in (loss_of, compiled):
        tensors = trained(layer)
        loss = function(*tensors.values())
        loss.backward()
        found.append([loss.detach(), *gradients(tensors).values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(7)}, ValueError, r"hidden must have shape \[T, H\].*got \[7\]"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight must have shape \[V, 24\].*\[5, 3\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[63\], got \[5\]"),
        ({"weight": torch.zeros(63, H).half()}, TypeError, "weight must have hidden's dtype"),
        (
            {"labels": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"labels must have shape \[9\]",
        ),
        ({"hidden": torch.zeros(9, H).double()}, TypeError, "weight must have hidden's dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    layer, batch = make_batch(9, 63)
    arguments = {**layer, **batch, **change}
    with pytest.raises(error, match=message):
        linear_grpo_loss(**arguments)
    labels = arguments["labels"]
    layer = {k: arguments[k] for k in layer}
    with pytest.raises(error, match=message):
        linear_token_log_probs(**layer, labels=labels)
