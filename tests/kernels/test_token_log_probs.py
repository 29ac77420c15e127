"""token_log_probs against fp64: every implementation, dtype and ragged shape."""

import pytest
import torch
from oracle import FAR, assert_gradient, far_logits, log_probs64

from regrpo_kernels import token_log_probs

SHAPES = [(0, 63), (1, 1), (3, 63), (257, 63), (3, 507), (2, 32000), (1, 151936)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient_match_fp64(implementation, dtype, shape, poisoned_empty):
    impl, device, _ = implementation
    logits = (torch.randn(shape) * 4).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1])
    exact = logits.double().requires_grad_()
    expected = log_probs64(exact, labels, temperature=0.7)
    x = logits.to(device).requires_grad_()
    out = token_log_probs(x, labels.to(device), temperature=0.7, return_entropy=True, impl=impl)
    # the reference sums 150,000 entropy terms in fp32 without blocks
    atol = 2e-5 if impl == "reference" else 3e-6
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=3e-7, atol=atol)
    assert (out.log_probs <= 0).all()

    dlog_probs, dentropy = torch.randn(shape[0]), torch.randn(shape[0])
    ((out.log_probs.cpu() * dlog_probs).sum() + (out.entropy.cpu() * dentropy).sum()).backward()
    ((expected[0] * dlog_probs).sum() + (expected[2] * dentropy).sum()).backward()
    # autograd of the reference loses more in the entropy
    assert_gradient(x.grad, exact.grad, dtype, 2e-5 if impl == "reference" else 1e-7)


def test_no_worse_than_eager_in_the_same_dtype(implementation, dtype):
    impl, device, _ = implementation
    logits = (torch.randn(8, 5000) * 6 + 50).to(dtype)
    labels = torch.randint(0, 5000, (8,))
    exact = log_probs64(logits, labels)[0]
    eager = torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]
    ours = token_log_probs(logits.to(device), labels.to(device), impl=impl).log_probs.cpu()
    assert (ours - exact).abs().max() <= (eager - exact).abs().max() + 2e-6


def test_softcap(implementation):
    impl, device, _ = implementation
    logits = torch.randn(4, 300) * 20
    labels = torch.randint(0, 300, (4,))
    exact = logits.double().requires_grad_()
    x = logits.to(device).requires_grad_()
    out = token_log_probs(
        x, labels.to(device), temperature=1.3, softcap=5.0, return_entropy=True, impl=impl
    )
    expected = log_probs64(exact, labels, 1.3, 5.0)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-6, atol=5e-6)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    (expected[0].sum() + expected[2].sum()).backward()
    # 1 - (z / c)^2 cancels where the cap saturates
    torch.testing.assert_close(x.grad.cpu().double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_ignored_rows_are_not_read(implementation, dtype, poisoned_empty):
    impl, device, _ = implementation
    logits = torch.randn(6, 70).to(dtype)
    labels = torch.randint(0, 70, (6,))
    labels[[1, 4]] = -100
    logits[1], logits[4] = float("nan"), float("inf")
    x = logits.to(device).requires_grad_()
    out = token_log_probs(x, labels.to(device), return_entropy=True, impl=impl)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    for value in (*out, x.grad):
        assert torch.isfinite(value).all()
        assert (value[[1, 4]] == 0).all()


def test_forbidden_tokens(implementation):
    """-inf logits have probability 0; the label's own gives log-prob -inf and a finite gradient."""
    impl, device, _ = implementation
    logits = torch.randn(3, 5000)
    logits[:, :3000] = -torch.inf  # whole blocks
    logits[1, 4000:] = -torch.inf
    labels = torch.tensor([3500, 3500, 7])
    x = logits.to(device).requires_grad_()
    out = token_log_probs(x, labels.to(device), return_entropy=True, impl=impl)
    expected = log_probs64(logits, labels)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-6, atol=1e-5)
    assert out.log_probs[2] == -torch.inf
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[:2, :3000] == 0).all()


def test_late_maximum_and_large_offsets(implementation):
    """The largest logit far from the start, and everything far from 0."""
    impl, device, _ = implementation
    logits = torch.randn(3, 9000) - 300
    logits[0, 8999] = 400.0
    logits[1, 5000] = -200.0
    labels = torch.tensor([8999, 4, 0])
    out = token_log_probs(logits.to(device), labels.to(device), return_entropy=True, impl=impl)
    expected = log_probs64(logits, labels)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=3e-7, atol=1e-5)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("spread", [False, True], ids=["one-hot", "spread"])
@pytest.mark.parametrize("offset", FAR)
def test_gradient_far_from_zero(implementation, offset, spread, entropy):
    """Probabilities must not come from a rounded lse."""
    impl, device, _ = implementation
    for dtype in (torch.float32, torch.bfloat16):
        logits, temperature = far_logits((4, 2500), offset, dtype)
        temperature = temperature if spread else 1.0
        labels = torch.randint(0, 2500, (4,))
        labels[:2] = logits[:2].argmax(-1)
        exact, x = logits.double().requires_grad_(), logits.to(device).requires_grad_()
        upstream = torch.randn(2, 4)
        for rows, leaf in (
            (log_probs64(exact, labels, temperature), exact),
            (
                token_log_probs(
                    x, labels.to(device), temperature=temperature, return_entropy=True, impl=impl
                ),
                x,
            ),
        ):
            moved = upstream.to(leaf.device)
            total = (rows[0] * moved[0]).sum() + entropy * (rows[2] * moved[1]).sum()
            total.backward()
        # autograd of the reference keeps log-probs in fp32
        atol = 1e-3 / temperature if impl == "reference" and spread else 0.0
        assert_gradient(x.grad, exact.grad, dtype, atol)


def test_a_forbidden_label_far_from_zero(implementation):
    impl, device, _ = implementation
    logits, _ = far_logits((2, 300), 2.0**13, torch.float32)
    labels = torch.tensor([3, 4])
    logits[0, 3] = -torch.inf
    x = logits.to(device).requires_grad_()
    out = token_log_probs(x, labels.to(device), impl=impl)
    assert out.log_probs[0] == -torch.inf
    out.log_probs.sum().backward()
    onehot = torch.nn.functional.one_hot(labels, 300)
    assert_gradient(x.grad, onehot - torch.softmax(logits.double(), -1), torch.float32)


def test_entropy_gradient_of_huge_logits_and_upstream(implementation):
    """No product may overflow on the way."""
    impl, device, _ = implementation
    logits = torch.randn(2, 300).sign() * 1e37
    logits[:, 7] = 1e37
    exact, x = logits.double().requires_grad_(), logits.to(device).requires_grad_()
    labels = torch.tensor([7, 7])
    out = token_log_probs(x, labels.to(device), temperature=0.05, return_entropy=True, impl=impl)
    expected = log_probs64(exact, labels, 0.05)
    torch.testing.assert_close(out.entropy.cpu().double(), expected[2], rtol=1e-6, atol=0)
    (1e6 * out.entropy.sum() + out.log_probs.sum()).backward()
    (1e6 * expected[2].sum() + expected[0].sum()).backward()
    assert_gradient(x.grad, exact.grad, torch.float32, atol=1.0)


@pytest.mark.parametrize("view", ["shifted", "vocabulary slice", "every other row"])
def test_views_are_read_in_place(implementation, dtype, view):
    impl, device, _ = implementation
    base = torch.randn(3, 6, 75).to(dtype)
    take = {
        "shifted": lambda t: t[:, :-1],
        "vocabulary slice": lambda t: t[:, :, 1:72],
        "every other row": lambda t: t[::2, ::2],
    }[view]
    labels = torch.randint(0, take(base).shape[-1], take(base).shape[:2])
    x = base.to(device).requires_grad_()
    out = token_log_probs(take(x), labels.to(device), impl=impl)
    exact = base.detach().double().requires_grad_()
    expected = log_probs64(take(exact), labels)[0]
    torch.testing.assert_close(out.log_probs.cpu().double(), expected, rtol=3e-7, atol=3e-6)
    out.log_probs.sum().backward()
    expected.sum().backward()
    assert_gradient(x.grad, exact.grad, dtype)


def test_offsets_past_32_bits(implementation):
    impl, device, _ = implementation
    stride, vocab = 2**31 + 64, 80
    storage = torch.empty(stride + vocab, dtype=torch.float16, device=device)  # pages untouched
    logits = storage.as_strided((2, vocab), (stride, 1))
    values = torch.randn(2, vocab).half()
    logits.copy_(values)
    labels = torch.tensor([3, 4])
    out = token_log_probs(logits, labels.to(device), impl=impl)
    expected = log_probs64(values, labels)[0]
    torch.testing.assert_close(out.log_probs.cpu().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must have dtype torch.int64"),
        ({"labels": torch.full((4,), 9)}, ValueError, r"labels\[0\] = 9 is out of range"),
        ({"labels": torch.tensor([0, 0, -1, 0])}, ValueError, r"labels\[2\] = -1 is out of range"),
        ({"logits": torch.zeros(4)}, ValueError, "logits must have shape"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "V > 0"),
        ({"logits": torch.zeros(4, 9).double()}, TypeError, "logits must have one of the dtypes"),
        ({"logits": torch.zeros(9, 4).t()}, ValueError, "contiguous in the vocabulary dimension"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be None or greater than 0"),
        ({"impl": "fast"}, ValueError, "impl must be None or one of"),
        ({"impl": "cuda"}, (RuntimeError, ValueError), "impl='cuda'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_arguments(change, error, message):
    arguments = {"logits": torch.zeros(4, 9), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        token_log_probs(arguments.pop("logits"), arguments.pop("labels"), **arguments)
