"""Liger's entry points on our kernels: against fp64, and against Liger's own where it is right."""

import inspect
import itertools

import pytest
import torch
from loss_types64 import LOSS_TYPES, batch, log_probs64, loss64

from regrpo_kernels.compat import liger

CLIP = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}

CASES = [
    pytest.param(loss_type, options, id="-".join((loss_type, *options)))
    for loss_type, options in itertools.product(
        LOSS_TYPES,
        (
            {},
            {"beta": 0.0},
            {"bias_correction": True},
            {"level": "sequence"},
            {"level": "sequence", "bias_correction": True},
            {"level": "sequence", "is_ratio": "token"},
            {"delta": 1.1},
            {"is_ratio": "token"},
            {"is_ratio": "sequence"},
            {"num_items": 40},
            {"eps_high": 3.0},
            {"old": None},
        ),
    )
    if loss_type in CLIP or not ({"level", "delta"} & set(options))
]


def expected(data, log_probs, loss_type, options):
    options = dict(options)
    old = data["old"] if "old" not in options else options.pop("old")
    ratio = options.pop("is_ratio", None)
    if ratio is not None:
        options["is_ratio"] = ours_ratio(data, ratio).reshape(len(data["ids"]), -1).double()
    return loss64(
        log_probs,
        data["mask"],
        data["advantages"],
        old,
        data["ref"],
        loss_type=loss_type,
        **options,
    )


def ours_ratio(data, kind):
    return {None: None, "token": data["is_ratio"], "sequence": data["is_ratio"][:, 0]}[kind]


NAMES = {
    "level": "importance_sampling_level",
    "bias_correction": "use_bias_correction_kl",
    "num_items": "num_items_in_batch",
}


def arguments(data, options, low_high):
    options = dict(options)
    old = data["old"] if "old" not in options else options.pop("old")
    found = {NAMES.get(name, name): value for name, value in options.items()}
    found["vllm_is_ratio"] = ours_ratio(data, found.pop("is_ratio", None))
    found[low_high[1]] = found.pop("eps_high", 0.2)
    found[low_high[0]] = 0.2
    return old, found


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "fresh"])
@pytest.mark.parametrize(("loss_type", "options"), CASES)
def test_loss_from_logits(loss_type, options, inplace):
    data = batch()
    exact = data["logits"].double().requires_grad_()
    log_probs = log_probs64(exact[:, :-1], data["ids"], 0.9)
    loss, token, kl, clipped = expected(data, log_probs, loss_type, options)
    (gradient,) = torch.autograd.grad(loss, exact, retain_graph=True)
    upstream = torch.randn_like(token)
    (token_gradient,) = torch.autograd.grad(token, exact, upstream)

    old, found = arguments(data, options, ("eps_low", "eps_high"))
    call = {"loss_type": loss_type, "inplace": inplace, "temperature": 0.9, **found}
    call.setdefault("beta", 0.04)
    dirty = {name: data[name].masked_fill(data["mask"] == 0, torch.nan) for name in ("old", "ref")}
    old = None if old is None else dirty["old"]
    inputs = (old, dirty["ref"], data["ids"], data["advantages"], data["mask"])

    logits = data["logits"].clone().requires_grad_()
    got, metrics = liger.triton_grpo_loss(logits, *inputs, reduce=True, **call)
    got.backward()
    torch.testing.assert_close(got.double(), loss, **TOLERANCE)
    torch.testing.assert_close(logits.grad.double(), gradient, **TOLERANCE)
    tokens = data["mask"].sum()
    means = [x.sum() / tokens for x in (kl, clipped) if x is not None]
    torch.testing.assert_close(
        [x.double() for x in metrics], [x.detach() for x in means], **TOLERANCE
    )

    logits = data["logits"].clone().requires_grad_()
    got, got_kl, got_clipped = liger.triton_grpo_loss(logits, *inputs, **call)
    got.backward(upstream.float())
    torch.testing.assert_close(got.double(), token, **TOLERANCE)
    torch.testing.assert_close(logits.grad.double(), token_gradient, **TOLERANCE)
    torch.testing.assert_close(got_clipped.double(), clipped)
    if kl is None:
        assert got_kl is None
    else:
        torch.testing.assert_close(got_kl.double(), kl.detach(), **TOLERANCE)


@pytest.mark.parametrize(("loss_type", "options"), CASES)
def test_loss_from_hidden_states(loss_type, options):
    data = batch(hidden=5)
    leaves = [data[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    log_probs = log_probs64(leaves[0] @ leaves[1].T + leaves[2], data["ids"], 0.9)
    loss, _, kl, clipped = expected(data, log_probs, loss_type, {"max_length": 9, **options})
    gradients = torch.autograd.grad(loss, leaves)

    old, found = arguments(data, options, ("epsilon_low", "epsilon_high"))
    call = {
        name: found.pop(name) for name in ("vllm_is_ratio", "num_items_in_batch") if name in found
    }
    module = liger.LigerFusedLinearGRPOLoss(
        loss_type=loss_type, temperature=0.9, max_completion_length=9, **found
    )
    hidden, weight, bias = (data[x].clone().requires_grad_() for x in ("hidden", "weight", "bias"))
    got, metrics = module(
        hidden,
        weight,
        data["ids"],
        data["mask"],
        data["advantages"],
        bias,
        ref_per_token_logps=data["ref"],
        old_per_token_logps=old,
        **call,
    )
    got.backward()
    torch.testing.assert_close(got.double(), loss, **TOLERANCE)
    for leaf, gradient in zip((hidden, weight, bias), gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, **TOLERANCE)
    means = [x.sum() / data["mask"].sum() for x in (kl, clipped) if x is not None]
    torch.testing.assert_close(
        [x.double() for x in metrics], [x.detach() for x in means], **TOLERANCE
    )


def test_reference_from_hidden_states():
    data = batch(hidden=5)
    inputs = (data["hidden"], data["weight"], data["ids"], data["mask"], data["advantages"])
    module = liger.LigerFusedLinearGRPOLoss(loss_type="bnpo")
    ref_weight = data["weight"] + 0.1
    ref = log_probs64(data["hidden"] @ ref_weight.T, data["ids"], 1.0).float()
    a = module(*inputs, ref_input=data["hidden"], ref_weight=ref_weight)
    b = module(*inputs, ref_per_token_logps=ref)
    torch.testing.assert_close(a, b)


def test_no_reference_model_is_a_kl_of_zero():
    data = batch(hidden=5)
    inputs = (data["hidden"], data["weight"], data["ids"], data["mask"], data["advantages"])
    loss, (kl, _) = liger.LigerFusedLinearGRPOLoss(use_ref_model=False)(*inputs)
    free, _ = liger.LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0)(*inputs)
    assert kl == 0
    assert loss == free


def test_log_probs_of_the_last_tokens():
    data = batch()
    ids = torch.cat([torch.zeros(3, 4, dtype=torch.int64), data["ids"]], 1)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.int64), data["mask"]], 1)
    logits = data["logits"].requires_grad_()
    got = liger.fused_selective_log_softmax(logits, ids, mask=mask)
    assert not got.requires_grad
    exact = log_probs64(data["logits"][:, :-1], data["ids"], 0.9) * data["mask"]
    torch.testing.assert_close(got.double(), exact, **TOLERANCE)


def test_a_large_log_ratio_stays_finite():
    data = batch()
    old = data["old"] - 100.0  # exp(100) overflows in fp32
    for level in ("token", "sequence"):
        logits = data["logits"].clone().requires_grad_()
        loss, _ = liger.triton_grpo_loss(
            logits,
            old,
            data["ref"] + 200.0,
            data["ids"],
            data["advantages"],
            data["mask"],
            reduce=True,
            importance_sampling_level=level,
            loss_type="grpo",
        )
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


def test_masked_logits_may_hold_anything():
    data = batch()
    hole = torch.cat([data["mask"], torch.zeros(3, 1, dtype=torch.int64)], 1) == 0
    clean = liger.triton_grpo_loss(
        data["logits"], data["old"], data["ref"], data["ids"], data["advantages"], data["mask"]
    )
    logits = data["logits"].masked_fill(hole.unsqueeze(-1), torch.nan).requires_grad_()
    found = liger.triton_grpo_loss(
        logits, data["old"], data["ref"], data["ids"], data["advantages"], data["mask"]
    )
    torch.testing.assert_close(found, clean)
    found[0].sum().backward()
    assert logits.grad.isfinite().all()


def test_more_than_65535_tokens():
    length = 70_000
    logits = torch.zeros(1, length + 1, 4, requires_grad=True)
    ids = torch.zeros(1, length, dtype=torch.int64)
    loss, _ = liger.triton_grpo_loss(
        logits, None, None, ids, torch.ones(1), beta=0.0, loss_type="dapo", reduce=True
    )
    loss.backward()
    assert logits.grad[0, -2, 0] == pytest.approx(-0.75 / length / 0.9)


def test_inplace_waits_for_backward_and_refuses_a_second_one():
    data = batch()
    logits = data["logits"].clone().requires_grad_()
    storage = logits.data_ptr()
    inputs = (data["old"], data["ref"], data["ids"], data["advantages"], data["mask"])
    loss, _ = liger.triton_grpo_loss(logits, *inputs, reduce=True)
    torch.testing.assert_close(logits.detach(), data["logits"])
    loss.backward(retain_graph=True)
    assert logits.grad.data_ptr() == storage
    with pytest.raises(RuntimeError, match="inplace=False"):
        loss.backward()


def test_inplace_does_not_feed_gradients_to_an_op_that_saved_the_logits():
    data = batch()
    scores = data["logits"].clone().requires_grad_()
    logits = torch.tanh(scores)  # its backward reads its output
    loss, _ = liger.triton_grpo_loss(
        logits, None, data["ref"], data["ids"], data["advantages"], data["mask"], reduce=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD = [
    ({"loss_type": "ppo"}, "loss_type"),
    ({"importance_sampling_level": "batch"}, "importance_sampling_level"),
    ({"loss_type": "cispo", "delta": 2.0}, "delta"),
    ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "not supported"),
    ({"ref_logp": None}, "ref_logp"),
    ({"advantages": torch.ones(4)}, "advantages"),
    ({"completion_mask": torch.full((3, 7), 0.5)}, "completion_mask"),
    ({"vllm_is_ratio": torch.ones(3, 2)}, "vllm_is_ratio"),
    ({"temperature": 0.0}, "temperature"),
    ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg"),
    ({"completion_ids": torch.zeros(3, 6, dtype=torch.int64)}, "completion_ids"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named(change, message):
    data = batch()
    call = {
        "logits": data["logits"],
        "old_logp": data["old"],
        "ref_logp": data["ref"],
        "completion_ids": data["ids"],
        "advantages": data["advantages"],
        "completion_mask": data["mask"],
    }
    with pytest.raises(ValueError, match=message):
        liger.triton_grpo_loss(**{**call, **change})


def test_bad_arguments_of_the_module_are_named():
    data = batch(hidden=5)
    inputs = (data["hidden"], data["weight"], data["ids"], data["mask"], data["advantages"])
    with pytest.raises(ValueError, match="max_completion_length"):
        liger.LigerFusedLinearGRPOLoss(loss_type="dr_grpo")(*inputs)
    with pytest.raises(ValueError, match="sapo_temperature_pos"):
        liger.LigerFusedLinearGRPOLoss(sapo_temperature_pos=0.0)
    module = liger.LigerFusedLinearGRPOLoss(
        loss_type="cispo", importance_sampling_level="sequence", use_ref_model=False
    )
    with pytest.raises(ValueError, match="Sequence-level"):
        module(*inputs)
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        liger.LigerFusedLinearGRPOLoss()(
            *inputs, ref_per_token_logps=data["ref"], ref_input=data["hidden"]
        )
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        liger.LigerFusedLinearGRPOLoss()(*inputs)
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        liger.LigerFusedLinearGRPOLoss(use_ref_model=False)(
            *inputs, ref_per_token_logps=data["ref"]
        )


# --- the installed peer ---------------------------------------------------------------------------


@pytest.fixture
def peer():
    return pytest.importorskip("liger_kernel.chunked_loss")


def test_signatures_are_ligers(peer):
    transformers = pytest.importorskip("liger_kernel.transformers.grpo_loss")

    def parameters(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    theirs = peer.LigerFusedLinearGRPOLoss
    ours = liger.LigerFusedLinearGRPOLoss
    assert parameters(ours.__init__) == parameters(theirs.__init__)
    assert parameters(ours.forward) == parameters(theirs.forward)
    for name in ("triton_grpo_loss", "fused_selective_log_softmax"):
        assert parameters(getattr(liger, name)) == parameters(getattr(transformers, name))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", [x for x in LOSS_TYPES if x != "luspo"])
def test_linear_loss_is_ligers(peer, loss_type, level):
    if level == "sequence" and loss_type not in CLIP:
        pytest.skip("Liger refuses it")
    data = batch(hidden=5)
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    options |= {"max_completion_length": 9, "compiled": False}
    found = []
    for kind in (peer.LigerFusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss):
        hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
        loss, metrics = kind(**options)(
            hidden,
            weight,
            data["ids"],
            data["mask"],
            data["advantages"],
            ref_per_token_logps=data["ref"],
            old_per_token_logps=data["old"],
        )
        loss.backward()
        found.append((loss.detach(), metrics, hidden.grad, weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
