"""What only a CUDA device can show: graph capture, streams, devices, sizes, no synchronisation.

Everything else about the GPU kernels is in the other files here, whose `implementation` fixture
takes in the device's implementations.
"""

import pytest
import torch
from oracle import assert_gradient, grpo_loss64, log_probs64

from regrpo_kernels import (
    Objective,
    build_info,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_log_probs,
    token_log_probs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
OBJECTIVE = Objective(beta=0.05, entropy_coef=0.01)
OPTIONS = {"beta": 0.05, "entropy_coef": 0.01}


@pytest.fixture(params=["triton", "cuda"])
def impl(request):
    if request.param == "cuda" and not build_info()["cuda_architectures"]:
        pytest.skip("the CUDA kernels are not compiled")
    return request.param


def make_batch(tokens, vocab, dtype=torch.bfloat16, device=DEVICE):
    """Old and reference log-probs are a little away from the current ones."""
    logits = torch.empty(tokens, vocab, dtype=dtype, device=device)
    for rows in logits.split(1024):  # no fp32 copy of the whole
        rows.copy_(torch.randn(rows.shape, device=device) * 3)
    labels = torch.randint(vocab, (tokens,), device=device)
    near = torch.log_softmax(logits[:1].float(), -1).mean().item()
    return logits, {
        "labels": labels,
        "advantages": torch.randn(tokens, device=device),
        "old_log_probs": near + 0.3 * torch.randn(tokens, device=device),
        "ref_log_probs": near + 0.3 * torch.randn(tokens, device=device),
        "loss_mask": torch.rand(tokens, device=device) < 0.7,
    }


def forward_and_gradient(logits, tokens, impl, inplace=False):
    x = logits.detach().requires_grad_()
    out = grpo_loss(x, **tokens, objective=OBJECTIVE, inplace=inplace, impl=impl)
    return out.loss.detach(), out.log_probs, *torch.autograd.grad(out.loss, x)


def log_probs_and_gradient(logits, tokens, impl):
    x = logits.detach().requires_grad_()
    out = token_log_probs(x, tokens["labels"], return_entropy=True, impl=impl)
    loss = (out.log_probs * tokens["advantages"]).sum() + out.entropy.sum()
    return out.log_probs.detach(), out.entropy.detach(), *torch.autograd.grad(loss, x)


def rows_expected(logits, tokens, rows):
    """fp64 gradient of `grpo_loss` for some of the rows."""
    weights = tokens["loss_mask"].double() / tokens["loss_mask"].sum()
    pick = [
        tokens[k][rows].cpu() for k in ("labels", "advantages", "old_log_probs", "ref_log_probs")
    ]
    labels, *rest = pick
    return grpo_loss64(logits[rows].cpu(), labels, weights[rows].cpu(), *rest, **OPTIONS)[1]


@pytest.mark.parametrize("vocab", [32000, 102400, 128256, 151936, 262144, 151937])
def test_real_vocabularies_match_fp64(impl, dtype, vocab):
    logits, tokens = make_batch(33, vocab, dtype)
    labels = tokens["labels"].cpu()
    exact = logits.cpu().double().requires_grad_()
    expected = log_probs64(exact, labels)
    found = log_probs_and_gradient(logits, tokens, impl)
    for ours, theirs in zip(found, (expected[0], expected[2]), strict=False):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=3e-7, atol=5e-6)
    ((expected[0] * tokens["advantages"].cpu()).sum() + expected[2].sum()).backward()
    assert_gradient(found[-1], exact.grad, dtype, 5e-6)
    gradient = forward_and_gradient(logits, tokens, impl)[-1]
    assert_gradient(gradient, rows_expected(logits, tokens, slice(None)), dtype, 1e-8)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_grpo_loss_is_captured_in_a_graph(impl, inplace):
    check_capture(lambda *a: forward_and_gradient(*a, impl, inplace))


def test_token_log_probs_is_captured_in_a_graph(impl):
    check_capture(lambda *a: log_probs_and_gradient(*a, impl))


def check_capture(function):
    """A replay over new inputs gives the bits of a call on them."""
    logits, tokens = make_batch(257, 5003)
    fresh, fresh_tokens = make_batch(257, 5003)
    expected = [x.clone() for x in function(fresh.clone(), fresh_tokens)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, as capture may not
        function(logits.clone(), tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(logits, tokens)
    for _ in range(2):  # in place, the first replay leaves no logits
        logits.copy_(fresh)
        for name, value in fresh_tokens.items():
            tokens[name].copy_(value)
        graph.replay()
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_nothing_synchronises(impl):
    logits, tokens = make_batch(64, 5003)
    forward_and_gradient(logits, tokens, impl)  # compiles
    log_probs_and_gradient(logits, tokens, impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_gradient(logits, tokens, impl)
        forward_and_gradient(logits.clone(), tokens, impl, inplace=True)
        log_probs_and_gradient(logits, tokens, impl)
        group_advantages(tokens["advantages"], 8, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_on_the_current_stream(impl):
    """Inputs that a side stream makes late are waited for by whatever runs on that stream."""
    logits, tokens = make_batch(64, 5003)
    expected = [
        *forward_and_gradient(logits, tokens, impl),
        *log_probs_and_gradient(logits, tokens, impl),
    ]
    late = torch.full_like(logits, torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # does not wait for the default stream, nor that for it
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.copy_(logits)
        found = [
            *forward_and_gradient(late, tokens, impl),
            *log_probs_and_gradient(late, tokens, impl),
        ]
    side.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one(impl):
    logits, tokens = make_batch(64, 5003)
    there = {name: value.to("cuda:1") for name, value in tokens.items()}
    with torch.cuda.device(0):
        found = forward_and_gradient(logits.to("cuda:1"), there, impl)
        found += log_probs_and_gradient(logits.to("cuda:1"), there, impl)
    expected = forward_and_gradient(logits, tokens, impl)
    expected += log_probs_and_gradient(logits, tokens, impl)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.index == 1
        torch.testing.assert_close(ours.cpu(), theirs.cpu())


def test_two_runs_give_the_same_bits_at_scale(impl):
    """More rows than the device runs at once, while other work takes part of it."""
    logits, tokens = make_batch(4096, 32000)
    hidden = torch.randn(2048, 512, device=DEVICE).bfloat16()
    weight = torch.randn(32000, 512, device=DEVICE).mul_(0.05).bfloat16()
    some = {name: value[:2048] for name, value in tokens.items()}
    busy = torch.randn(4096, 4096, device=DEVICE)

    def everything():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_grpo_loss(h, w, **some, objective=OBJECTIVE, impl=impl)
        out.loss.backward()
        rows = linear_token_log_probs(hidden, weight, some["labels"], impl=impl)
        return [
            *forward_and_gradient(logits, tokens, impl),
            *log_probs_and_gradient(logits, tokens, impl),
            out.loss.detach(),
            h.grad,
            w.grad,
            rows.log_probs,
        ]

    first = everything()
    side = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):
            for _ in range(20):
                torch.mm(busy, busy)
        for ours, theirs in zip(everything(), first, strict=True):
            assert torch.equal(ours, theirs)
    torch.cuda.synchronize()


def test_more_elements_than_31_bits_count(impl):
    tokens_count, vocab = 16384, 151936
    assert tokens_count * vocab > 2**31
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    logits, tokens = make_batch(tokens_count, vocab)
    boundary = 2**31 // vocab
    rows = torch.tensor([0, 1, boundary - 1, boundary, boundary + 1, tokens_count - 1])
    rows = rows.to(DEVICE)
    tokens["loss_mask"][rows] = True
    kept = logits[rows].cpu()
    labels = tokens["labels"][rows].cpu()
    expected = log_probs64(kept, labels)
    found = token_log_probs(logits, tokens["labels"], return_entropy=True, impl=impl)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[rows].cpu().double(), theirs, rtol=3e-7, atol=5e-6)
    gradient_expected = rows_expected(logits, tokens, rows)
    for inplace in (False, True):
        gradient = forward_and_gradient(logits, tokens, impl, inplace)[-1]
        assert_gradient(gradient[rows], gradient_expected, torch.bfloat16, 1e-9)
        masked = (~tokens["loss_mask"]).nonzero()[-1, 0]
        assert (gradient[masked] == 0).all()
        del gradient


def test_more_rows_than_a_grid_dimension_of_16_bits(impl):
    logits, tokens = make_batch(70_000, 1000)
    rows = torch.tensor([0, 65534, 65535, 65536, 69_999], device=DEVICE)
    tokens["loss_mask"][rows] = True
    expected = log_probs64(logits[rows].cpu(), tokens["labels"][rows].cpu())
    found = token_log_probs(logits, tokens["labels"], return_entropy=True, impl=impl)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[rows].cpu().double(), theirs, rtol=3e-7, atol=5e-6)
    gradient = forward_and_gradient(logits, tokens, impl)[-1]
    assert_gradient(gradient[rows], rows_expected(logits, tokens, rows), torch.bfloat16, 1e-9)


def test_compiles_with_inductor(impl):
    hidden = torch.randn(65, 48, device=DEVICE)
    weight = torch.randn(5003, 48, device=DEVICE) / 7
    _, tokens = make_batch(65, 5003, torch.float32)

    def loss_of(hidden, weight):
        logits = hidden @ weight.T
        rows = token_log_probs(logits, tokens["labels"], impl=impl)
        out = grpo_loss(logits, **tokens, objective=OBJECTIVE, impl=impl)
        linear = linear_grpo_loss(hidden, weight, **tokens, objective=OBJECTIVE, impl=impl)
        return out.loss + linear.loss + rows.log_probs.mean()

    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
