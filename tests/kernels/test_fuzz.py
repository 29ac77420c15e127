"""Random cases of every op on every implementation against fp64: `pytest -m fuzz`, in minutes.

A failure prints the case and a `@reproduce_failure(...)` line; paste that over the test to run the
case again, or `--hypothesis-seed=N` to repeat a whole run.
"""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from fuzz_cases import MANY, Batch, Rows64, batches, loss64, losses
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from test_group_advantages import BASELINES, SCALES, expected

from regrpo_kernels import (
    Objective,
    Segment,
    force_isa,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_head,
    linear_token_log_probs,
    reflection_advantages,
    token_log_probs,
)

LEAST_CASES = 2000
CASES = Counter()

pytestmark = pytest.mark.fuzz
every_implementation = pytest.mark.parametrize("on", IMPLEMENTATIONS, ids=lambda i: i.id)
# the advantage ops have one C++ kernel for all instruction sets
every_kernel = pytest.mark.parametrize(
    "on", {(i.impl, i.device): i for i in IMPLEMENTATIONS}.values(), ids=lambda i: i.id
)


def fuzz(cases):
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=False,
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def isa_of(on):
    return force_isa(on.isa) if on.isa else nullcontext()


def length_for(on):
    return 3 if on == ("triton", "cpu", None) else 12  # tens of milliseconds a row, interpreted


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- inputs as views of larger buffers ------------------------------------------------------------


def placed(batch: Batch, device):
    """`(buffer, view)`: the logits as a view, by the batch's layout; the rest of the buffer is a
    guard.
    """
    rows, vocab = batch.logits.shape
    if not batch.padded:
        shape, view = {
            "contiguous": ((rows, vocab), lambda b: b),
            "columns": ((rows, vocab + 5), lambda b: b[:, 2 : 2 + vocab]),
            "every other row": ((2 * rows + 1, vocab), lambda b: b[1::2]),
        }[batch.layout]
    else:
        count, length = len(batch.lengths), batch.lengths[0]
        shape, view = {
            "contiguous": ((count, length, vocab), lambda b: b),
            "shifted": ((count, length + 1, vocab), lambda b: b[:, :-1]),
            "transposed": ((length, count, vocab), lambda b: b.transpose(0, 1)),
        }[batch.layout]
    buffer = torch.full(shape, 3.0, dtype=batch.logits.dtype, device=device)
    values = batch.logits.to(device)
    view(buffer).copy_(values.view(view(buffer).shape))
    return buffer, view


def shaped(batch: Batch, values, device):
    """A per-token input: padded where the batch is; expanded, or every other element."""
    if values is None:
        return None
    shape = (len(batch.lengths), batch.lengths[0]) if batch.padded else values.shape
    if values.stride() == (0,):
        return values[:1].to(device).expand(shape)
    values = values.view(shape)
    return torch.stack([values, values], -1).to(device)[..., 0]


def spoil(batch: Batch, how: int, reference: bool):
    """Rows that are not trained may hold anything: `(labels, loss_mask)` say so in either way."""
    skipped = ~batch.trained
    batch.logits[skipped] = [torch.nan, torch.inf, 0.0][how]
    for values in (batch.advantages, batch.old_log_probs, batch.ref_log_probs):
        if values is not None and values.stride() != (0,):
            values[skipped] = torch.nan
    labels = batch.labels.clone()
    by_label = skipped & (torch.arange(len(labels)) % 2 == 0)
    if not reference:
        labels[skipped] = 10**6
    labels[by_label] = -100
    return labels, batch.trained | by_label


# --- checks ---------------------------------------------------------------------------------------


def assert_within(ours, exact, bound, where, what):
    error = (ours.double() - exact).abs()
    wrong = where & ~(error <= bound) & (ours != exact.to(ours.dtype))
    assert not wrong.any(), (
        f"{what}: {ours[wrong][0]:.9g}, expected {exact[wrong][0]:.9g} to {bound[wrong][0]:.3g}, "
        f"at {wrong.nonzero()[0].tolist()}"
    )


def assert_rows(out, rows: Rows64, kept, entropy):
    """log_probs, lse and entropy of the kept rows; zero in the others."""
    for name, value in out.items():
        assert (value[~kept] == 0).all(), name
    log_probs = out["log_probs"][kept]
    assert not (log_probs > 0).any()
    assert log_probs[rows.poisoned].isnan().logical_or(log_probs[rows.poisoned] == -torch.inf).all()
    assert (log_probs[rows.forbidden] == -torch.inf).all()
    exact = rows.log_probs.detach()
    assert_within(log_probs, exact, rows.slack, ~rows.poisoned & ~rows.forbidden, "log_prob")
    if "lse" in out:
        assert_within(out["lse"][kept], rows.lse.detach(), rows.lse_slack, ~rows.poisoned, "lse")
    if entropy:
        exact, slack = rows.entropy.detach(), rows.entropy_slack
        assert_within(out["entropy"][kept], exact, slack, ~rows.poisoned & (slack < 1), "entropy")


def assert_row_gradient(ours, exact, bound, rows: Rows64, kept, largest_slope):
    """Everywhere finite where the contract says so, and right where a number is not in doubt."""
    assert (ours[~kept] == 0).all(), "gradient of a skipped row"
    dtype, ours = ours.dtype, ours[kept]
    fits = exact.abs() + bound < 0.99 * torch.finfo(dtype).max
    assert_within(ours, exact, bound, rows.clear[:, None] & fits, "gradient")
    if dtype != torch.float16 or largest_slope < 1e4 * rows.temperature:
        assert torch.isfinite(ours[rows.sound]).all()
    if rows.softcap is None:
        never = (rows.x == -1e290) & (torch.arange(ours.shape[1]) != rows.labels[:, None])
        assert (ours[never & rows.sound[:, None]] == 0).all(), "gradient of a forbidden token"


# --- row ops --------------------------------------------------------------------------------------


@every_implementation
@fuzz(100)
@given(data=st.data())
def test_token_log_probs(on, data):
    batch = data.draw(batches(length_for(on)))
    how, entropy = data.draw(st.integers(0, 2)), data.draw(st.booleans())
    kept, vocab = batch.trained, batch.logits.shape[1]
    rows = Rows64(batch.logits[kept], batch.labels[kept], **batch.options)
    batch.logits[~kept] = [torch.nan, torch.inf, 0.0][how]
    labels = shaped(batch, batch.labels.masked_fill(~kept, -100), on.device)
    buffer, view = placed(batch, on.device)
    before = buffer.clone()
    x = view(buffer).detach().requires_grad_()
    with isa_of(on):
        out = token_log_probs(x, labels, **batch.options, return_entropy=entropy, impl=on.impl)
        g = torch.Generator().manual_seed(batch.seed)
        upstream = torch.randn(2, len(kept), generator=g) * data.draw(
            st.sampled_from([1.0, 0, 1e6])
        )
        moved = upstream.view(2, *labels.shape).to(on.device)
        outputs = [out.log_probs, out.entropy] if entropy else [out.log_probs]
        (gradient,) = torch.autograd.grad(outputs, x, [*moved][: len(outputs)])
    same(buffer, before)
    assert all(v is None or v.shape == labels.shape for v in out)
    named = {k: v.detach().cpu().flatten() for k, v in out._asdict().items() if v is not None}
    assert_rows(named, rows, kept, entropy)
    c, dentropy = upstream.double()[:, kept]
    k = -dentropy * entropy
    exact, bound = rows.gradient(c, k, 1e-6 * c.abs(), batch.logits.dtype)
    gradient = gradient.cpu().reshape(-1, vocab)
    assert_row_gradient(gradient, exact, bound, rows, kept, upstream.abs().sum())
    CASES["token_log_probs"] += 1


@every_implementation
@fuzz(160)
@given(data=st.data())
def test_grpo_loss(on, data):
    batch = data.draw(losses(length_for(on)))
    kept, vocab = batch.trained, batch.logits.shape[1]
    inplace = on.impl != "reference" and data.draw(st.booleans())
    rows = Rows64(
        batch.logits[kept],
        batch.labels[kept],
        batch.options["temperature"],
        batch.options["softcap"],
    )
    wanted = loss64(batch, rows)
    exact, bound = rows.gradient(wanted.c, wanted.k, wanted.c_slack, batch.logits.dtype)

    inputs = loss_inputs(batch, data.draw(st.integers(0, 2)), on)
    copies = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    buffer, view = placed(batch, on.device)
    before = buffer.clone()
    x = view(buffer).detach().requires_grad_()
    with isa_of(on):
        out = grpo_loss(x, **inputs, inplace=inplace, impl=on.impl)
        (gradient,) = torch.autograd.grad(out.loss, x)
    for name, copy in copies.items():
        same(inputs[name], copy)
    if inplace and x.numel():
        assert gradient.data_ptr() == x.data_ptr()
        view(before).copy_(gradient)
    same(buffer, before)  # all of it, or what the view leaves out

    named = {"log_probs": out.log_probs, "entropy": out.entropy}
    assert_rows({k: v.cpu().flatten() for k, v in named.items()}, rows, kept, True)
    gradient = gradient.cpu().reshape(-1, vocab)
    assert_row_gradient(gradient, exact, bound, rows, kept, largest_slope(batch, wanted))
    assert_loss(out, wanted)
    CASES["grpo_loss"] += 1


def loss_inputs(batch: Batch, how, on):
    per_token = batch.given_advantages is batch.advantages
    labels, loss_mask = spoil(batch, how, on.impl == "reference")
    kind = [torch.bool, torch.int64, torch.float32][how]
    bounds = torch.tensor([0, *batch.lengths]).cumsum(0)
    return {
        "labels": shaped(batch, labels, on.device),
        "advantages": shaped(batch, batch.advantages, on.device)
        if per_token
        else batch.given_advantages.to(on.device),
        "old_log_probs": shaped(batch, batch.old_log_probs, on.device),
        "ref_log_probs": shaped(batch, batch.ref_log_probs, on.device),
        "loss_mask": shaped(batch, loss_mask.to(kind), on.device),
        "cu_seqlens": None if batch.padded else bounds.to(on.device, torch.int32),
        "objective": Objective(**batch.options),
        "normalizer": batch.normalizer,
    }


def largest_slope(batch, wanted):
    """How large a gradient may be, where rounding decides on a ratio of up to exp(20)."""
    doubtful = ~wanted.rows.clear & ~wanted.rows.poisoned
    far = doubtful.any() and (batch.old_log_probs is not None or batch.ref_log_probs is not None)
    sizes = wanted.c[wanted.rows.clear].abs()
    return MANY if far else max([1e-6 * MANY * bool(doubtful.any()), *sizes.tolist()])


def assert_loss(out, wanted):
    sound = wanted.rows.clear
    if not sound.all() or not (wanted.tokens.abs() < 1e37).all():
        return
    total, slack = wanted.tokens.sum(), wanted.token_slack.sum()
    slack = slack + 2e-6 * wanted.tokens.abs().sum() + 1e-37
    error = (out.loss.detach().cpu().double() - total).abs()
    assert error <= slack, f"loss {out.loss.item():.9g}, expected {total:.9g} to {slack:.3g}"
    assert all(torch.isfinite(v) for k, v in out.metrics.items() if not k.startswith("ratio/m"))


# --- linear ops -----------------------------------------------------------------------------------

STEP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def make_layer(batch: Batch, hidden_size, bias):
    """A head for the batch's tokens: `(tensors, fp64 logits, their error)`."""
    g = torch.Generator().manual_seed(batch.seed + 2)
    tokens, vocab = batch.logits.shape
    dtype = batch.logits.dtype
    layer = {
        "hidden": torch.randn(tokens, hidden_size, generator=g),
        "weight": torch.randn(vocab, hidden_size, generator=g) / hidden_size**0.5,
        "bias": torch.randn(vocab, generator=g) if bias else None,
    }
    layer = {k: None if v is None else v.to(dtype) for k, v in layer.items()}
    hidden, weight = layer["hidden"].double(), layer["weight"].double()
    offset = layer["bias"].double() if bias else torch.zeros(vocab, dtype=torch.float64)
    size = (hidden.abs() @ weight.abs().T + offset.abs()).amax(-1)
    return layer, hidden @ weight.T + offset, (2 * STEP[dtype] + hidden_size * 6e-8) * size


def run_linear(on, batch, layer, needs, chunk_bytes, op):
    """`(output, gradients)`; hidden is spoiled where a row is not trained, and padded."""
    layer = dict(layer)
    layer["hidden"] = layer["hidden"].masked_fill(~batch.trained[:, None], torch.nan)
    if batch.padded:
        hidden_size = layer["hidden"].shape[1]
        layer["hidden"] = layer["hidden"].view(len(batch.lengths), batch.lengths[0], hidden_size)
    layer = {
        k: None if v is None else v.to(on.device).requires_grad_(n)
        for (k, v), n in zip(layer.items(), needs, strict=True)
    }
    copies = {k: v.detach().clone() for k, v in layer.items() if v is not None}
    with pytest.MonkeyPatch.context() as patch, isa_of(on):
        patch.setattr(linear_head, "CHUNK_BYTES", {"cpu": chunk_bytes, "cuda": chunk_bytes})
        out, scalar = op(layer)
        if scalar.requires_grad:
            scalar.backward()
    for name, copy in copies.items():
        same(layer[name].detach(), copy)
    for value, need in zip(layer.values(), needs, strict=True):
        assert value is None or (value.grad is not None) is need
    return out, {k: v.grad.cpu() for k, v in layer.items() if v is not None and v.requires_grad}


def assert_layer_gradients(gradients, layer, batch, exact, bound):
    """`exact`, `bound`: of the logits of the trained rows."""
    kept, dtype = batch.trained, batch.logits.dtype
    hidden, weight = layer["hidden"][kept].double(), layer["weight"].double()
    rounding = 4 * STEP[dtype] + 1e-6
    products = {
        "hidden": (lambda d: d @ weight, lambda d: d @ weight.abs()),
        "weight": (lambda d: d.T @ hidden, lambda d: d.T @ hidden.abs()),
        "bias": (lambda d: d.sum(0), lambda d: d.sum(0)),
    }
    for name, gradient in gradients.items():
        through, size = products[name]
        allowed = size(bound) + rounding * size(exact.abs())
        if dtype == torch.float16:  # subnormals, rounded once a chunk
            allowed = allowed + 6e-8 * (1 + kept.sum())
        if name == "hidden":
            gradient = gradient.reshape(-1, weight.shape[1])
            assert (gradient[~kept] == 0).all()
            gradient = gradient[kept]
        assert gradient.dtype == dtype
        assert_within(gradient, through(exact), allowed, torch.tensor(True), f"d {name}")


linear_options = st.tuples(
    st.sampled_from([1, 7, 16, 33]),  # H
    st.booleans(),  # bias
    st.tuples(st.booleans(), st.booleans(), st.booleans()),  # what is trained
    st.sampled_from([1, 1 << 12, 1 << 27]),  # bytes a chunk
)


@every_implementation
@fuzz(60)
@given(data=st.data())
def test_linear_token_log_probs(on, data):
    batch = data.draw(batches(length_for(on), extreme=False))
    hidden_size, bias, needs, chunk_bytes = data.draw(linear_options)
    needs = (*needs[:2], needs[2] and bias)
    entropy = data.draw(st.booleans())
    kept = batch.trained
    layer, logits, noise = make_layer(batch, hidden_size, bias)
    rows = Rows64(logits[kept], batch.labels[kept], **batch.options, noise=noise[kept])
    g = torch.Generator().manual_seed(batch.seed)
    upstream = torch.randn(2, len(kept), generator=g)
    labels = shaped(batch, batch.labels.masked_fill(~kept, -100), on.device)

    def op(layer):
        out = linear_token_log_probs(
            layer["hidden"],
            layer["weight"],
            labels,
            bias=layer["bias"],
            **batch.options,
            return_entropy=entropy,
            impl=on.impl,
        )
        moved = upstream.view(2, *labels.shape).to(on.device)
        scalar = (out.log_probs * moved[0]).sum()
        return out, scalar + (out.entropy * moved[1]).sum() if entropy else scalar

    out, gradients = run_linear(on, batch, layer, needs, chunk_bytes, op)
    named = {k: v.detach().cpu().flatten() for k, v in out._asdict().items() if v is not None}
    assert_rows(named, rows, kept, entropy)
    c, dentropy = upstream.double()[:, kept]
    exact, bound = rows.gradient(c, -dentropy * entropy, 1e-6 * c.abs(), batch.logits.dtype)
    assert_layer_gradients(gradients, layer, batch, exact, bound)
    CASES["linear_token_log_probs"] += 1


@every_implementation
@fuzz(80)
@given(data=st.data())
def test_linear_grpo_loss(on, data):
    batch = data.draw(losses(length_for(on), extreme=False))
    hidden_size, bias, needs, chunk_bytes = data.draw(linear_options)
    needs = (*needs[:2], needs[2] and bias)
    kept, o = batch.trained, batch.options
    layer, logits, noise = make_layer(batch, hidden_size, bias)
    rows = Rows64(logits[kept], batch.labels[kept], o["temperature"], o["softcap"], noise[kept])
    wanted = loss64(batch, rows)
    exact, bound = rows.gradient(wanted.c, wanted.k, wanted.c_slack, batch.logits.dtype)
    inputs = loss_inputs(batch, data.draw(st.integers(0, 2)), on)

    def op(layer):
        out = linear_grpo_loss(
            layer["hidden"], layer["weight"], bias=layer["bias"], **inputs, impl=on.impl
        )
        return out, out.loss

    out, gradients = run_linear(on, batch, layer, needs, chunk_bytes, op)
    named = {"log_probs": out.log_probs, "entropy": out.entropy}
    assert_rows({k: v.cpu().flatten() for k, v in named.items()}, rows, kept, True)
    largest = torch.finfo(batch.logits.dtype).max
    if ((exact.abs() + bound) < 0.01 * largest / logits.shape[1]).all():
        assert_layer_gradients(gradients, layer, batch, exact, bound)
    assert_loss(out, wanted)
    CASES["linear_grpo_loss"] += 1


# --- advantages -----------------------------------------------------------------------------------

rules = st.fixed_dictionaries(
    {
        "baseline": st.sampled_from(BASELINES),
        "scale": st.sampled_from(SCALES),
        "min_std": st.sampled_from([0.0, 0.3, 50.0]),
        "clip": st.sampled_from([None, 0.7]),
    }
)
# multiples of 1/8: a mean is exact where a reward equals it
some_rewards = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 0.125, 1e4, torch.nan]), min_size=1, max_size=6
)


@st.composite
def groupings(draw, sequences):
    """`(what the op takes, ids)`."""
    if draw(st.booleans()):
        size = draw(
            st.sampled_from([n for n in range(1, sequences + 1) if sequences % n == 0] or [3])
        )
        return size, torch.arange(sequences) // size
    kinds = draw(st.sampled_from([1, 2, 5, 1000]))
    ids = torch.randint(kinds, (sequences,)) * draw(st.sampled_from([1, -(2**52)]))
    return torch.stack([ids, ids], 1)[:, 0], ids


def assert_advantages(ours, rewards, ids, **rule):
    exact = expected(rewards.tolist(), ids.tolist(), **rule)
    assert torch.isfinite(ours).all()
    largest = exact.abs().max() if len(exact) else 0.0
    finite = exact.abs() < 3e38
    torch.testing.assert_close(
        ours[finite].double(), exact[finite], rtol=3e-7, atol=1e-9 + 1e-13 * float(largest)
    )


@every_kernel
@fuzz(150)
@given(data=st.data())
def test_group_advantages(on, data):
    most = 40 if on == ("triton", "cpu", None) else 300
    sequences = data.draw(st.one_of(st.integers(0, 12), st.integers(0, most)))
    pool = torch.tensor(data.draw(some_rewards))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    rewards = pool[torch.randint(len(pool), (sequences,))]
    if data.draw(st.booleans()):
        rewards = rewards + torch.randn(sequences)
    rewards = rewards * data.draw(st.sampled_from([1.0, 2.0**100, 2.0**-130]))
    groups, ids = data.draw(groupings(sequences))
    options = data.draw(rules) | {
        "ddof": data.draw(st.sampled_from([0, 1])),
        "eps": data.draw(st.sampled_from([1e-4, 0.5])),
    }
    given_rewards = torch.stack([rewards, rewards], 1)[:, 1].to(on.device)
    moved = groups.to(on.device) if torch.is_tensor(groups) else groups
    ours = group_advantages(given_rewards, moved, **options, impl=on.impl).cpu()
    same(given_rewards.cpu(), rewards)
    assert_advantages(ours, rewards, ids, **options)
    CASES["group_advantages"] += 1


@every_kernel
@fuzz(150)
@given(data=st.data())
def test_reflection_advantages(on, data):
    lengths = data.draw(
        st.lists(
            st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 1025, 4097])), max_size=20
        )
    )
    sequences, tokens = len(lengths), sum(lengths)
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.int64]))
    segments = torch.randint(4, (tokens,)).to(dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    success = torch.randint(3, (sequences,)) / 2
    success[torch.rand(sequences) < 0.1] = torch.nan
    scores = torch.rand(sequences).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    groups, ids = data.draw(groupings(sequences))
    price = data.draw(
        st.fixed_dictionaries(
            {
                "lambda_exec": st.sampled_from([1.0, 0.0, -3.0]),
                "eta": st.sampled_from([0.0, 0.1, 7.0]),
                "tokens_per_cost": st.sampled_from([1.0, 100.0]),
                "lambda_val": st.sampled_from([0.0, 0.3]),
            }
        )
    )
    rule = data.draw(rules)
    offset = data.draw(st.integers(0, 3))  # of an unaligned view
    inputs = [
        success,
        torch.cat([segments[:1].new_zeros(offset), segments])[offset:],
        bounds,
        groups,
    ]
    inputs = [x.to(on.device) if torch.is_tensor(x) else x for x in inputs]
    copies = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    out = reflection_advantages(
        *inputs, **price, **rule, verifier_scores=scores.to(on.device), impl=on.impl
    )
    for value, copy in zip(inputs, copies, strict=True):
        same(value, copy)
    out = type(out)(*(t.cpu() for t in out))

    sequence = torch.arange(sequences).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    counts = sequence[segments == Segment.REFLECTION].bincount(minlength=sequences)
    assert torch.equal(out.reflection_tokens, counts)
    rewards = price["lambda_exec"] * success.double() + price["lambda_val"] * scores.double()
    rewards -= price["eta"] * counts / price["tokens_per_cost"]
    torch.testing.assert_close(out.rewards, rewards.float(), rtol=2e-7, atol=1e-7, equal_nan=True)
    assert_advantages(out.advantages, out.rewards, ids, **rule)
    trained = (segments == Segment.ACTION) | (segments == Segment.REFLECTION)
    assert torch.equal(out.loss_mask, trained)
    assert torch.equal(out.token_advantages, torch.where(trained, out.advantages[sequence], 0.0))
    CASES["reflection_advantages"] += 1


def test_enough_cases_ran(request):
    """The last test: what a whole run has covered."""
    chosen = sum(item.get_closest_marker("fuzz") is not None for item in request.session.items)
    everything = 4 * len(IMPLEMENTATIONS) + 2 * len({i[:2] for i in IMPLEMENTATIONS}) + 1
    if chosen < everything:
        pytest.skip("only some of the fuzz tests were chosen")
    print(dict(CASES))
    assert CASES.total() >= LEAST_CASES
