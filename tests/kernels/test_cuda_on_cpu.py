"""The CUDA kernels, every path of them, on the CPU against fp64. No GPU is needed; see cuda_on_cpu.

Which path runs follows from the emulated device: thread-block clusters on 9.x and 10.x, and how
many CTAs they need from its shared memory; one CTA a row elsewhere.
"""

import math
import os
import shutil

import pytest
import torch
from cuda_on_cpu import (
    AdvantageRule,
    Emulator,
    GroupAdvantagesArgs,
    ReflectionAdvantagesArgs,
    SequenceObjectiveArgs,
    objective_params,
)
from oracle import FAR, assert_gradient, far_logits, grpo_loss64, log_probs64, token_loss64

from regrpo_kernels._library import pointer
from regrpo_kernels.grpo_rows import STATS

KIB = 1024
A100 = (80, 163 * KIB, 164 * KIB)
RTX = (89, 99 * KIB, 100 * KIB)
LITTLE = (86, 20 * KIB, 42 * KIB)  # most of a row is read twice
H200 = (90, 227 * KIB, 228 * KIB)
B200 = (100, 227 * KIB, 228 * KIB)
RTX_BLACKWELL = (120, 99 * KIB, 100 * KIB)
VOCABULARIES = [1, 63, 507, 4099, 32000]
CLUSTER_HEADER = 512  # sizeof(ClusterShared)


def slices_of(ranks, vocab, dtype):
    """A device on which a row takes a cluster of so many CTAs."""
    row = vocab * dtype.itemsize
    need = (row // 128 + ranks) // ranks * 128 + CLUSTER_HEADER
    return (90, need, need + KIB if ranks == 16 else 3 * (need + KIB))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("no g++ on PATH (or CXX) to compile the CUDA kernels for the CPU with")
    return Emulator(compiler, tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(params=[H200, A100, LITTLE], ids=["H200", "A100", "little"])
def device(request, emulator):
    emulator.use(*request.param)
    return emulator


class Guarded:
    """A tensor with other memory around and between its rows, which nothing may write to."""

    def __init__(self, values, base_shape=None, take=lambda t: t, shift=0):
        shape = base_shape or values.shape
        size = torch.Size(shape).numel()
        bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
        self.storage = torch.full((size + 128,), -1, dtype=bits)  # NaN in every dtype
        aligned = -(self.storage.data_ptr() // values.element_size()) % 16  # of 16 bytes
        within = slice(32 + aligned + shift, 32 + aligned + shift + size)
        self.inside = torch.zeros(size + 128, dtype=torch.bool)
        take(self.inside[within].view(shape)).fill_(True)
        self.view = take(self.storage[within].view(values.dtype).view(shape))
        self.view.copy_(values)

    def assert_untouched(self):
        assert (self.storage[~self.inside] == -1).all(), "written outside of the rows"


def make_batch(tokens, vocab, dtype, spread=3.0, **scaling):
    logits = (torch.randn(tokens, vocab) * spread).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    log_probs = log_probs64(logits, labels, **scaling)[0].float()
    mask = torch.rand(tokens) < 0.7
    mask[:1] = True
    return {
        "logits": logits,
        "labels": labels,
        "mask": mask,
        "weights": mask / mask.sum().clamp(min=1),
        "advantages": torch.randn(tokens),
        "old": log_probs + 0.3 * torch.randn(tokens),
        "ref": log_probs + 0.5 * torch.randn(tokens),
    }


def run(emulator, batch, inplace=False, **options):
    """`(statistics, gradient)` from guarded buffers."""
    rest = {name: value for name, value in batch.items() if name != "logits"}
    logits = Guarded(batch["logits"])
    out = logits if inplace else Guarded(torch.full_like(batch["logits"], torch.nan))
    stats = emulator.grpo_loss(logits.view, out.view, **rest, **options)
    logits.assert_untouched()
    out.assert_untouched()
    if not inplace:
        assert torch.equal(logits.view.nan_to_num(), batch["logits"].nan_to_num())
    return stats, out.view.clone()


def assert_matches(batch, stats, gradient, atol=0.0, **options):
    scaling = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    arguments = [batch[k] for k in ("logits", "labels", "weights", "advantages", "old", "ref")]
    loss, expected = grpo_loss64(*arguments, **options)
    torch.testing.assert_close(
        (stats["loss"] * batch["weights"]).sum().double(), loss, rtol=2e-6, atol=2e-6
    )
    mask = batch["mask"]
    rows = log_probs64(batch["logits"][mask], batch["labels"][mask], **scaling)
    for name, value in zip(("log_prob", "lse", "entropy"), rows, strict=True):
        torch.testing.assert_close(stats[name][mask].double(), value, rtol=3e-7, atol=3e-6)
    for name, value in stats.items():
        assert (value[~mask] == 0).all(), name
    assert (stats["log_prob"] <= 0).all()
    assert_gradient(gradient, expected, batch["logits"].dtype, atol)


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 5])
def test_grpo_loss(device, dtype, tokens, vocab):
    batch = make_batch(tokens, vocab, dtype)
    for inplace in (False, True):
        stats, gradient = run(device, batch, inplace, beta=0.05)
        assert_matches(batch, stats, gradient, beta=0.05)


@pytest.mark.parametrize(
    ("spec", "cluster"),
    [(H200, 4), (B200, 4), (A100, 1), (RTX, 1), (RTX_BLACKWELL, 1)],
    ids=["H200", "B200", "A100", "RTX", "RTX Blackwell"],
)
def test_a_large_vocabulary(emulator, spec, cluster):
    emulator.use(*spec)
    batch = make_batch(2, 151936, torch.bfloat16)
    batch["mask"] = torch.ones(2, dtype=torch.bool)
    batch["weights"] = torch.full((2,), 0.5)
    stats, gradient = run(emulator, batch, beta=0.05)
    assert emulator.library.last_cluster() == cluster
    assert emulator.library.last_grid() == 2 * cluster
    assert_matches(batch, stats, gradient, beta=0.05)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("vocab", [4099, 32000])
def test_every_cluster_size(emulator, dtype, vocab, ranks):
    batch = make_batch(2, vocab, dtype)
    emulator.use(*slices_of(ranks, vocab, dtype))
    results = [run(emulator, batch, inplace, entropy_coef=0.1) for inplace in (False, True)]
    assert emulator.library.last_cluster() == ranks
    for stats, gradient in results:
        assert_matches(batch, stats, gradient, entropy_coef=0.1)
    values = emulator.token_log_probs(batch["logits"], batch["labels"])
    assert emulator.library.last_cluster() == ranks
    for ours, theirs in zip(values, log_probs64(batch["logits"], batch["labels"]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-7, atol=3e-6)


def test_a_row_too_long_for_a_cluster(emulator):
    emulator.use(90, 12 * KIB, 26 * KIB)
    batch = make_batch(1, 60000, torch.float32)
    stats, gradient = run(emulator, batch)
    assert (emulator.library.last_cluster(), emulator.library.last_grid()) == (1, 1)
    assert_matches(batch, stats, gradient)
    log_prob, _, _ = emulator.token_log_probs(batch["logits"], batch["labels"])
    assert (emulator.library.last_cluster(), emulator.library.last_grid()) == (1, 1)
    torch.testing.assert_close(log_prob, stats["log_prob"], rtol=3e-7, atol=3e-6)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo", "reinforce", "nll"])
def test_every_policy(device, policy, kl_estimator):
    options = {
        "policy": policy,
        "kl_estimator": kl_estimator,
        "beta": 0.1,
        "epsilon_low": 0.1,
        "epsilon_high": 0.25,
        "sapo_tau_neg": 1.5,
        "temperature": 0.8,
    }
    batch = make_batch(7, 63, torch.float32, temperature=0.8)
    stats, gradient = run(device, batch, **options)
    assert_matches(batch, stats, gradient, **options)


@pytest.mark.parametrize("vocab", [70, 4099])
@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.3},
        {"entropy_coef": 0.2},
        {"softcap": 6.0},
        {"softcap": 6.0, "entropy_coef": 0.1, "temperature": 1.4},
    ],
    ids=lambda o: "-".join(o) if isinstance(o, dict) else None,
)
def test_options(device, dtype, options, vocab):
    scaling = {k: v for k, v in options.items() if k in ("softcap", "temperature")}
    batch = make_batch(3, vocab, dtype, **scaling)
    stats, gradient = run(device, batch, **options)
    # 1 - (z / c)^2 cancels where the softcap saturates
    assert_matches(batch, stats, gradient, 2e-7 if scaling else 0.0, **options)


VIEWS = {
    "shifted": lambda t: t[:, :-1],
    "vocabulary slice": lambda t: t[:, :, 1:-3],
    "every other row": lambda t: t[::2, ::2],
}


@pytest.mark.parametrize("vocab", [75, 1003])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_views(device, dtype, view, vocab, shift):
    """Strided rows at any alignment, the gradient in place and at another alignment."""
    shape = (3, 4, vocab)
    values = VIEWS[view](torch.randn(shape).to(dtype))
    labels = torch.randint(0, values.shape[-1], values.shape[:2])
    tokens = labels.numel()
    batch = make_batch(tokens, values.shape[-1], dtype) | {
        "logits": values.reshape(tokens, -1),
        "labels": labels.flatten(),
    }
    rest = {
        k: None if v is None else v.view(labels.shape) for k, v in batch.items() if k != "logits"
    }
    logits = Guarded(values, shape, VIEWS[view], shift)
    fresh = Guarded(torch.full_like(values, torch.nan).contiguous(), shift=2)
    for out in (fresh, logits):
        stats = device.grpo_loss(logits.view, out.view, **rest, beta=0.1)
        logits.assert_untouched()
        out.assert_untouched()
        stats = {name: value.flatten() for name, value in stats.items()}
        assert_matches(batch, stats, out.view.reshape(tokens, -1), beta=0.1)


def test_masked_rows_are_not_read(device, dtype):
    batch = make_batch(6, 507, dtype)
    mask = batch["mask"] = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    batch["weights"] = mask / 3
    clean = run(device, batch, beta=0.1)
    for name in ("logits", "advantages", "old", "ref"):
        batch[name][~mask] = torch.nan
    batch["logits"][1] = torch.inf
    batch["labels"][~mask] = 10**12
    for inplace in (False, True):
        stats, gradient = run(device, batch, inplace, beta=0.1)
        assert torch.equal(gradient, clean[1])
        assert (gradient[~mask] == 0).all()
        for name, value in stats.items():
            assert torch.equal(value, clean[0][name]), name


def test_rows_without_a_gradient(device):
    """A coefficient of exactly 0 writes zeros; without an output nothing is written."""
    batch = make_batch(3, 507, torch.bfloat16) | {"advantages": torch.zeros(3)}
    _, gradient = run(device, batch)
    assert (gradient == 0).all()
    logits = Guarded(batch["logits"])
    rest = {name: value for name, value in batch.items() if name != "logits"}
    stats = device.grpo_loss(logits.view, None, **rest)
    assert torch.equal(logits.view, batch["logits"])
    assert torch.isfinite(stats["loss"]).all()


@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo", "reinforce"])
def test_forbidden_tokens(device, policy):
    """A label at a -inf logit: log-prob -inf, ratio 0, finite gradient."""
    batch = make_batch(3, 4099, torch.float32)
    batch["logits"][:, :3000] = -torch.inf
    batch["logits"][:, 3000::2] = -torch.inf
    batch["labels"] = torch.tensor([4, 3001, 3002])
    batch["old"] = batch["ref"] = torch.tensor([-3.0, -4.0, -torch.inf])
    batch["mask"] = torch.ones(3, dtype=torch.bool)
    batch["weights"] = torch.full((3,), 1 / 3)
    for entropy_coef in (0.0, 0.1):
        stats, gradient = run(device, batch, policy=policy, beta=0.1, entropy_coef=entropy_coef)
        assert torch.isfinite(gradient).all()
        assert (gradient[1, :3000] == 0).all()
        assert (stats["log_prob"][[0, 2]] == -torch.inf).all()
        assert (stats["ratio"][[0, 2]] == 0).all()
        _, lse, entropy = log_probs64(batch["logits"], batch["labels"])
        torch.testing.assert_close(stats["lse"].double(), lse, rtol=3e-7, atol=3e-6)
        torch.testing.assert_close(stats["entropy"].double(), entropy, rtol=3e-7, atol=3e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 1, 250, 4098])
def test_nan_and_infinity_show(device, value, position):
    batch = make_batch(1, 4099, torch.float32)
    batch["logits"][0, position] = value
    batch["labels"][0] = 700
    stats, gradient = run(device, batch, entropy_coef=0.1)
    assert stats["lse"].isnan().all()
    assert stats["entropy"].isnan().all()
    assert stats["log_prob"].isnan().all()
    assert gradient.isnan().all()


def test_all_forbidden(device):
    logits = torch.full((1, 507), -torch.inf)
    log_prob, lse, entropy = device.token_log_probs(logits, torch.zeros(1, dtype=torch.int64))
    assert log_prob.isnan().all()
    assert lse == -torch.inf
    assert entropy.isnan().all()


@pytest.mark.parametrize("offset", [0.0, 300.0, -1e4, 2e5])
def test_peaked_rows_far_from_zero(device, dtype, offset):
    if dtype == torch.float16 and abs(offset) > 6e4:
        pytest.skip("past the range of fp16")
    batch = make_batch(3, 4099, dtype, spread=20.0)
    batch["logits"] = (batch["logits"].float() + offset).to(dtype)
    batch["logits"][0, 4098] = offset + 100.0
    batch["labels"][:2] = torch.tensor([4098, 17])
    batch["mask"] = torch.ones(3, dtype=torch.bool)
    batch["weights"] = torch.full((3,), 1 / 3)
    log_prob, lse, entropy = log_probs64(batch["logits"], batch["labels"])
    batch["old"] = batch["ref"] = log_prob.float()
    stats, gradient = run(device, batch, entropy_coef=0.1)
    for name, value in (("log_prob", log_prob), ("lse", lse), ("entropy", entropy)):
        torch.testing.assert_close(stats[name].double(), value, rtol=3e-7, atol=2e-5)
    assert (stats["log_prob"] <= 0).all()
    assert (stats["entropy"] >= 0).all()
    assert torch.isfinite(gradient).all()


def test_offsets_past_32_bits(device):
    stride, vocab = 2**31 + 64, 80
    batch = make_batch(2, vocab, torch.float16)
    batch["mask"] = torch.ones(2, dtype=torch.bool)
    batch["weights"] = torch.full((2,), 0.5)
    storage = torch.empty(stride + vocab, dtype=torch.float16)  # pages untouched
    logits = storage.as_strided((2, vocab), (stride, 1))
    logits.copy_(batch["logits"])
    rest = {name: value for name, value in batch.items() if name != "logits"}
    stats = device.grpo_loss(logits, logits, **rest)
    assert_matches(batch, stats, logits)


@pytest.mark.parametrize("value", [1e30, -3e38, 3.4e38])
def test_huge_equal_logits(device, value):
    """Where fp64 could not tell lse from the maximum."""
    logits = torch.full((1, 507), value)
    logits[0, :7] = -torch.inf
    log_prob, lse, entropy = device.token_log_probs(logits, torch.tensor([40]), temperature=1.2)
    assert log_prob.item() == pytest.approx(-math.log(500), rel=1e-6)
    assert lse.item() == pytest.approx(value / 1.2, rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(500), rel=1e-6)


@pytest.mark.parametrize(
    "spec", [slices_of(4, 4099, torch.bfloat16), LITTLE], ids=["cluster", "row"]
)
def test_the_same_bits_in_any_order(emulator, spec):
    """Whichever thread runs first, whenever a copy lands: a missing barrier would show here."""
    emulator.use(*spec)
    batch = make_batch(3, 4099, torch.bfloat16)
    results = []
    try:
        for late, falling in ((True, False), (True, False), (False, False), (True, True)):
            emulator.library.set_order(late, falling)
            results.append(run(emulator, batch, inplace=True, beta=0.1, entropy_coef=0.1))
    finally:
        emulator.library.set_order(True, False)
    for stats, gradient in results[1:]:
        assert torch.equal(gradient, results[0][1])
        for name, value in stats.items():
            assert torch.equal(value, results[0][0][name]), name


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_token_log_probs(device, dtype, tokens, vocab):
    logits = Guarded((torch.randn(tokens, vocab) * 4).to(dtype), shift=vocab % 5)
    labels = torch.randint(0, vocab, (tokens,))
    exact = logits.view.double().requires_grad_()
    expected = log_probs64(exact, labels, temperature=0.7)
    row_sums = torch.full((2, tokens), torch.nan)
    out = device.token_log_probs(logits.view, labels, temperature=0.7, row_sums=row_sums)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=3e-7, atol=3e-6)
    without = device.token_log_probs(logits.view, labels, temperature=0.7, entropy=False)
    assert torch.equal(without[0], out[0])

    dlog_probs, dentropy = torch.randn(tokens), torch.randn(tokens)
    ((expected[0] * dlog_probs).sum() + (expected[2] * dentropy).sum()).backward()
    for dlogits in (
        Guarded(torch.full((tokens, vocab), torch.nan).to(dtype), shift=vocab % 5),
        Guarded(torch.full((tokens, vocab), torch.nan).to(dtype), shift=1),
        logits,
    ):
        device.token_log_probs_backward(
            logits.view,
            labels,
            dlogits.view,
            row_sums,
            dlog_probs,
            out[2],
            dentropy,
            temperature=0.7,
        )
        dlogits.assert_untouched()
        assert_gradient(dlogits.view, exact.grad, dtype)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_log_probs_gradient_without_entropy(device, dtype, softcap):
    logits = (torch.randn(3, 1003) * 4).to(dtype)
    labels = torch.randint(0, 1003, (3,))
    labels[1] = -100
    logits[1] = torch.nan
    exact = logits.double().requires_grad_()
    kept = [0, 2]
    expected = log_probs64(exact[kept], labels[kept], softcap=softcap)
    row_sums = torch.full((2, 3), torch.nan)
    log_probs, lse, _ = device.token_log_probs(logits, labels, softcap=softcap, row_sums=row_sums)
    torch.testing.assert_close(log_probs[kept].double(), expected[0].detach(), rtol=1e-6, atol=5e-6)
    assert log_probs[1] == lse[1] == 0
    dlog_probs = torch.tensor([1.0, torch.nan, -2.0])
    (expected[0] * dlog_probs[kept]).sum().backward()
    dlogits = Guarded(torch.full_like(logits, torch.nan))
    device.token_log_probs_backward(
        logits, labels, dlogits.view, row_sums, dlog_probs, softcap=softcap
    )
    dlogits.assert_untouched()
    assert (dlogits.view[1] == 0).all()
    assert_gradient(dlogits.view[kept], exact.grad[kept], dtype)


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("spread", [False, True], ids=["one-hot", "spread"])
@pytest.mark.parametrize("offset", FAR)
def test_token_log_probs_gradient_far_from_zero(device, offset, spread, entropy):
    """Probabilities must not come from a rounded lse."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, temperature = far_logits((4, 4099), offset, dtype)
        temperature = temperature if spread else 1.0
        labels = torch.randint(0, 4099, (4,))
        labels[:2] = logits[:2].argmax(-1)
        row_sums, upstream = torch.full((2, 4), torch.nan), torch.randn(2, 4)
        rows = device.token_log_probs(logits, labels, temperature, row_sums=row_sums)
        dlogits = Guarded(torch.full_like(logits, torch.nan))
        device.token_log_probs_backward(
            logits,
            labels,
            dlogits.view,
            row_sums,
            upstream[0],
            *([rows[2], upstream[1]] if entropy else []),
            temperature=temperature,
        )
        exact = logits.double().requires_grad_()
        log_probs, _, exact_entropy = log_probs64(exact, labels, temperature)
        total = (log_probs * upstream[0]).sum() + entropy * (exact_entropy * upstream[1]).sum()
        total.backward()
        assert_gradient(dlogits.view, exact.grad, dtype)


RULE = AdvantageRule(baseline=0, scale=1, ddof=1, eps=1e-4, min_std=0.0, clip=float("inf"))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("policy", ["clip", "cispo", "sapo", "reinforce", "nll"])
def test_sequence_objective(emulator, policy, entropy_coef):
    emulator.use(*A100)
    lengths = torch.tensor([700, 0, 1, 300, 9])
    sequences = torch.repeat_interleave(torch.arange(5), lengths)
    tokens = int(lengths.sum())
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    mask = (torch.rand(tokens) < 0.7) & (sequences != 4)
    stats = torch.full((len(STATS), tokens), torch.nan)
    stats[1:4] = torch.rand(3, tokens) * torch.tensor([[-5.0], [9.0], [3.0]])
    log_probs = stats[1].clone()
    old = log_probs + 0.2 * torch.randn(tokens) + torch.tensor([0.0, 0, -0.4, 0.3, 0])[sequences]
    ref, advantages, weights = torch.randn(3, tokens)
    ref += log_probs
    given = {"beta": 0.1, "entropy_coef": entropy_coef, "policy": policy}
    stats[1:4, ~mask] = 0.0
    old[~mask] = ref[~mask] = advantages[~mask] = torch.nan
    emulator.call(
        "sequence_objective",
        SequenceObjectiveArgs(
            tokens=tokens,
            sequences=len(lengths),
            cu_seqlens=pointer(bounds),
            mask=pointer(mask),
            weights=pointer(weights),
            advantages=pointer(None if policy == "nll" else advantages),
            old_log_probs=pointer(old),
            ref_log_probs=pointer(ref),
            objective=objective_params(**given),
            stats=pointer(stats),
        ),
    )
    leaf = log_probs[mask].double().requires_grad_()
    inputs = [x[mask] for x in (advantages, old, ref, sequences)]
    loss = token_loss64(leaf, *inputs, **given) - entropy_coef * stats[3][mask]
    (loss * weights[mask].double()).sum().backward()
    found = dict(zip(STATS, stats, strict=True))
    torch.testing.assert_close(found["loss"][mask].double(), loss.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found["dlog_prob"][mask].double(), leaf.grad, rtol=5e-6, atol=1e-6)
    assert (stats[:, ~mask] == 0).all()


def group_advantages64(rewards, groups):
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    for group in groups.unique():
        own = (groups == group) & ~rewards.isnan()
        x = rewards[own].double()
        if len(x) > 1:
            advantages[own] = (x - x.mean()) / (x.std() + 1e-4)
    return advantages


@pytest.mark.parametrize("ids", [False, True], ids=["equal groups", "ids"])
@pytest.mark.parametrize(("sequences", "size"), [(0, 4), (5, 1), (24, 8), (70, 35), (600, 300)])
def test_group_advantages(emulator, sequences, size, ids):
    rewards = torch.randn(sequences)
    rewards[::7] = torch.nan
    groups = torch.arange(sequences) // size
    if ids:
        groups = groups[torch.randperm(sequences)].contiguous()
    advantages = torch.full((sequences,), torch.nan)
    arguments = GroupAdvantagesArgs(
        sequences=sequences,
        rewards=pointer(rewards),
        group_ids=pointer(groups) if ids else 0,
        group_size=size,
        rule=RULE,
        advantages=pointer(advantages),
    )
    emulator.call("group_advantages", arguments)
    expected = group_advantages64(rewards, groups)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("id_dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("ids", [False, True], ids=["equal groups", "ids"])
def test_reflection_advantages(emulator, id_dtype, ids):
    lengths = torch.tensor([5, 0, 700, 33, 1, 300, 64, 2])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    sequences, tokens = len(lengths), int(lengths.sum())
    segment_ids = torch.randint(0, 4, (tokens,)).to(id_dtype)
    success = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 0])
    groups = torch.arange(sequences) // 4
    if ids:
        groups = groups[torch.randperm(sequences)].contiguous()
    count = torch.full((sequences,), -1)
    rewards, advantages = torch.full((2, sequences), torch.nan)
    token_advantages = torch.full((tokens,), torch.nan)
    loss_mask = torch.zeros(tokens, dtype=torch.bool)
    arguments = ReflectionAdvantagesArgs(
        tokens=tokens,
        success=pointer(success),
        verifier_scores=0,
        segment_ids=pointer(segment_ids),
        segment_id_bytes=id_dtype.itemsize,
        cu_seqlens=pointer(cu_seqlens),
        lambda_exec=1.0,
        eta=0.1,
        tokens_per_cost=100.0,
        lambda_val=0.0,
        reflection_tokens=pointer(count),
        rewards=pointer(rewards),
        group=GroupAdvantagesArgs(
            sequences=sequences,
            rewards=pointer(rewards),
            group_ids=pointer(groups) if ids else 0,
            group_size=4,
            rule=RULE,
            advantages=pointer(advantages),
        ),
        token_advantages=pointer(token_advantages),
        loss_mask=pointer(loss_mask),
    )
    emulator.call("reflection_advantages", arguments)
    sequence = torch.repeat_interleave(torch.arange(sequences), lengths)
    reflections = torch.bincount(sequence[segment_ids == 3], minlength=sequences)
    assert torch.equal(count, reflections)
    expected = success.double() - 0.1 * reflections / 100.0
    torch.testing.assert_close(rewards.double(), expected, rtol=1e-6, atol=1e-7)
    expected = group_advantages64(rewards, groups)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(loss_mask, (segment_ids == 1) | (segment_ids == 3))
    assert torch.equal(token_advantages, advantages[sequence] * loss_mask)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unequal barrier", "deadlock in the cluster of block 0: 32 threads have returned"),
        ("past shared memory", "a write past the dynamic shared memory"),
        ("no wait", "a bulk copy was still on its way"),
        ("unaligned copy", "not a multiple of 16 bytes"),
        ("none", ""),
    ],
)
def test_the_emulator_reports(emulator, fault, message):
    source = Guarded(torch.randn(64))
    out = torch.zeros(64)
    status = emulator.library.run_fault(fault.encode(), pointer(out), pointer(source.view))
    assert message in emulator.library.last_error().decode()
    assert (status == 0) == (fault == "none")


def test_the_emulator_poisons_shared_memory(emulator):
    out = torch.zeros(64)
    assert emulator.library.run_fault(b"uninitialised", pointer(out), 0) == 0
    assert out.isnan().all()
