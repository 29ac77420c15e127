"""Shared computation against each trajectory by itself: hidden states, loss, every gradient."""

import types
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_modeling import CONFIGS, random_model, randomised
from torch.utils._python_dispatch import TorchDispatchMode

from regrpo.losses import packed_log_probs, policy_loss
from regrpo.modeling import head, hidden_states, logit_softcap
from regrpo.packing import collate, pack_groups
from regrpo.prefix_tree import prefix_tree
from regrpo.segments import TokenizedTrajectory
from regrpo.tree_attention import AttentionPlan, PartsAttention, tree_attention
from regrpo_kernels import Objective, Segment

VOCABULARY = 48


def trajectory(ids, start):
    """Everything from ``start`` on is trained."""
    kinds = [int(Segment.CONTEXT if i < start else Segment.ACTION) for i in range(len(ids))]
    return TokenizedTrajectory(list(ids), kinds, [-1.0 - 0.1 * (i % 7) for i in range(len(ids))])


def groups(seed=0):
    """Two groups behind one system prompt: copies, a prefix of another, an empty tail."""
    g = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(3, VOCABULARY, (count,), generator=g).tolist()

    system, found = draw(5), []
    for _ in range(2):
        context, first = [*system, *draw(9)], draw(4)
        tails = [[*first, *draw(6)], [*first, *draw(3)], draw(7), draw(1), first, []]
        found.append([trajectory(context + t, len(context)) for t in [*tails, tails[2]]])
    return found


def batch_of(rows, share, seed=1):
    g = torch.Generator().manual_seed(seed)
    batch = collate(rows, with_old_log_probs=True, share=share)
    count = len(batch.labels)
    return replace(
        batch,
        advantages=torch.randn(count, generator=g),
        ref_log_probs=batch.old_log_probs + 0.3 * torch.randn(count, generator=g),
    )


def in_double(model):
    """Norms that compute in the dtype of their input; transformers' go through fp32."""

    def forward(norm, x):
        scale = norm.weight + ("Gemma" in type(norm).__name__)
        epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
        return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


def double_loss(hidden, weight, batch, softcap):
    """The clipped objective with its KL in fp64, over the rows that ``policy_loss`` takes."""
    rows = batch.loss_mask.nonzero().squeeze(1)
    logits = hidden[batch.computed(rows)] @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1).gather(1, batch.labels[rows, None])[:, 0]
    old, ref, advantages = (
        x[rows].double() for x in (batch.old_log_probs, batch.ref_log_probs, batch.advantages)
    )
    ratio = (log_probs - old).clamp(-20, 20).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (ref - log_probs).exp() - (ref - log_probs) - 1
    return (0.05 * kl - gain).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_unshared_ones(name, rank, tmp_path):
    model = in_double(randomised(random_model(name, tmp_path, lora_rank=rank)))
    rows = [t for group in groups() for t in group]
    results = []
    for share in (True, False):
        batch = batch_of(rows, share)
        hidden = hidden_states(model, batch)
        assert len(hidden) == (len(batch.tree) if share else len(batch.labels))
        loss = double_loss(hidden, head(model)[0], batch, logit_softcap(model))
        everywhere = hidden[batch.computed(torch.arange(len(batch.labels)))].detach()
        results.append((loss.item(), gradients(model, loss), everywhere))
    (ours, ours_gradient, ours_hidden), (loss, gradient, hidden) = results
    assert len(batch_of(rows, True).tree) < 0.5 * len(hidden)
    torch.testing.assert_close(ours_hidden, hidden, rtol=1e-10, atol=1e-10)
    assert ours == pytest.approx(loss, rel=1e-9, abs=1e-9)
    assert set(ours_gradient) == set(gradient)
    assert all("lora_" in key for key in gradient) == bool(rank)
    for key, value in gradient.items():
        assert value.abs().max() > 0, key
        torch.testing.assert_close(ours_gradient[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_in_bf16_the_difference_is_rounding(name, tmp_path):
    """No further from fp64 than the unshared gradient, by more than a quarter."""
    rows = [t for group in groups() for t in group]
    exact_model = random_model(name, tmp_path)
    model = random_model(name, tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        for exact, rounded in zip(exact_model.parameters(), model.parameters(), strict=True):
            exact.copy_(rounded)
    batch = batch_of(rows, share=False)
    objective = Objective(beta=0.05, softcap=logit_softcap(model))
    hidden = hidden_states(exact_model, batch)
    loss = double_loss(hidden, head(exact_model)[0], batch, logit_softcap(model))
    exact = gradients(exact_model, loss)
    errors = []
    for share in (True, False):
        batch = batch_of(rows, share)
        out = policy_loss(hidden_states(model, batch), *head(model), batch, objective, None)
        assert out.loss.item() == pytest.approx(loss.item(), rel=0.03, abs=0.03)
        found = gradients(model, out.loss)
        assert set(found) == set(exact)
        distances = [(found[k].double() - v).norm() / v.norm() for k, v in exact.items()]
        errors.append(torch.stack(distances).mean())
    assert errors[0] <= 1.25 * errors[1] + 1e-3
    assert errors[1] < 0.1


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_gradient_does_not_depend_on_the_packs(rank, tmp_path):
    model = randomised(random_model("qwen2", tmp_path, dtype=torch.float32, lora_rank=rank))
    rows = [t for group in groups() for t in group]
    indices = [range(7), range(7, 14)]
    whole = batch_of(rows, share=False)
    bounds = whole.cu_seqlens.tolist()
    results = []
    for budget in (1000, 45, 24):
        packs = pack_groups(indices, rows, budget)
        total = {}
        for pack in packs:
            places = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in pack])
            batch = replace(
                collate([rows[i] for i in pack], with_old_log_probs=True, share=True),
                advantages=whole.advantages[places],
                ref_log_probs=whole.ref_log_probs[places],
            )
            out = policy_loss(
                hidden_states(model, batch),
                *head(model),
                batch,
                Objective(beta=0.05),
                whole.loss_mask.sum(),
            )
            for key, value in gradients(model, out.loss).items():
                total[key] = total.get(key, 0) + value
        results.append((len(packs), total))
    assert [count for count, _ in results] == sorted({count for count, _ in results})
    out = policy_loss(hidden_states(model, whole), *head(model), whole, Objective(beta=0.05), None)
    expected = gradients(model, out.loss)
    for _, total in results:
        assert set(total) == set(expected)
        for key, value in expected.items():
            assert (total[key] - value).norm() <= 1e-4 * value.norm(), key


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(tmp_path):
    model = random_model("qwen2", tmp_path, dtype=torch.float32, lora_rank=4)
    batch = batch_of(groups()[0], share=True)
    weight, bias = head(model)
    assert not weight.requires_grad
    hidden = hidden_states(model, batch)
    with torch.profiler.profile(record_shapes=True) as profile:
        policy_loss(hidden, weight, bias, batch, Objective(policy="nll"), None).loss.backward()
    width, count = hidden.shape[1], int(batch.loss_mask.sum())
    shapes = [
        tuple(map(tuple, e.input_shapes[:2])) for e in profile.events() if e.name == "aten::mm"
    ]
    assert ((count, width), (width, VOCABULARY)) in shapes  # the logits
    assert ((count, VOCABULARY), (VOCABULARY, width)) in shapes  # the gradient of hidden
    assert not [s for s in shapes if s[0] == (VOCABULARY, count)]  # that of the head
    assert weight.grad is None


def test_log_probs_of_a_softcapped_model_are_those_of_its_logits(tmp_path):
    model = random_model("gemma2", tmp_path, dtype=torch.float32)
    assert logit_softcap(model) == 30.0
    rows = groups()[0]
    batch = collate(rows, share=True)
    values = packed_log_probs(
        hidden_states(model, batch), *head(model), batch, 1.0, logit_softcap(model)
    )
    start = 0
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        mask = batch.loss_mask[start : start + len(row)]
        expected = logits[:-1].gather(1, torch.tensor(row.input_ids[1:])[:, None])[:, 0]
        found = values[start : start + len(row) - 1]
        torch.testing.assert_close(found[mask[:-1]], expected[mask[:-1]], rtol=1e-4, atol=1e-4)
        start += len(row)


SEQUENCES = st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=8).filter(any)


def one_by_one(q, k, v, scale, window, softcap):
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(len(q))
    distance = places[:, None] - places
    unseen = (distance < 0) | (distance >= window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.7), (3, 0.7)])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(sequences=SEQUENCES, seed=st.integers(0, 100))
def test_attention_over_any_tree_equals_each_sequence_alone(window, softcap, sequences, seed):
    tree = prefix_tree(sequences)
    g = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(len(tree), heads, 8, generator=g, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    plan = AttentionPlan(tree.nodes, query.device)
    probe = torch.randn(len(tree.source), 4, 8, generator=g, dtype=torch.float64)
    ours = tree_attention(query, key, value, plan, scale=0.4, window=window, softcap=softcap)
    ours = ours[tree.source]
    parts, start = [], 0
    for length in map(len, sequences):
        rows = tree.source[start : start + length]
        q, k, v = query[rows], *(x[rows].repeat_interleave(2, dim=1) for x in (key, value))
        parts.append(one_by_one(q, k, v, 0.4, window or 99, softcap))
        start += length
    expected = torch.cat(parts)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    found, wanted = (
        torch.autograd.grad((out * probe).sum(), (query, key, value)) for out in (ours, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_gpu_gets_one_call_for_the_nodes_and_one_for_each_depth():
    """Shapes and arguments, by the meta device: what a GPU computes is not seen here."""
    tree = prefix_tree([t.input_ids for group in groups() for t in group])
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "flash" in str(func):
                calls.append((str(func), args))
            return func(*args, **(kwargs or {}))

    query, key = (
        torch.empty(len(tree), heads, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2)
    )
    with Record():
        parts = AttentionPlan(tree.nodes, query.device).cuda_parts
        out = PartsAttention.apply(query, key, key, parts, 0.125)
        out.sum().backward()
    assert out.shape == query.shape
    assert out.dtype == query.grad.dtype == torch.bfloat16
    assert query.grad.shape == query.shape
    assert key.grad.shape == key.shape
    forward = [args for name, args in calls if "_flash_attention_forward" in name]
    backward = [args for name, args in calls if "_flash_attention_backward" in name]
    inner = [node for node in tree.nodes if node.end > node.stop]
    depths = sorted({node.depth for node in inner})
    assert len(depths) == 3
    assert len(forward) == len(backward) == 1 + len(depths)
    for args, depth in zip(forward[1:], depths, strict=True):
        level = [node for node in inner if node.depth == depth]
        assert args[0].shape[0] == sum(node.end - node.stop for node in level)
        assert args[1].shape[0] == sum(map(len, level))
        assert args[3].shape[0] == args[4].shape[0] == len(level) + 1
        assert args[5] == max(node.end - node.stop for node in level)
        assert args[6] == max(map(len, level))
