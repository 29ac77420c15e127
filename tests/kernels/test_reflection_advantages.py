"""reflection_advantages: every implementation against plain Python, and its contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import GridExecutor

from regrpo_kernels import ReflectionAdvantages, Segment, group_advantages, reflection_advantages
from regrpo_kernels._library import CUDA_ARCHITECTURES, triton_interpreted

C, A, O, R = Segment.CONTEXT, Segment.ACTION, Segment.OBSERVATION, Segment.REFLECTION  # noqa: E741
NAN = float("nan")


def packed(sequences):
    """Segment ids and cu_seqlens of lists of segments."""
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).to(torch.int32)
    return torch.tensor(
        [int(s) for sequence in sequences for s in sequence], dtype=torch.int64
    ), bounds


def run(where, success, segment_ids, cu_seqlens, groups, **options):
    impl, device = where
    arguments = [
        argument.to(device) if isinstance(argument, torch.Tensor) else argument
        for argument in (success, segment_ids, cu_seqlens, groups)
    ]
    if options.get("verifier_scores") is not None:
        options["verifier_scores"] = options["verifier_scores"].to(device)
    out = reflection_advantages(*arguments, impl=impl, **options)
    return ReflectionAdvantages(*(tensor.cpu() for tensor in out))


def test_by_hand(where):
    # one state: one-shot success, recovery, failed recovery, failure without reflection
    sequences = [
        [C, C, A],
        [C, C, A, O, R, R, A],
        [C, C, A, O, R, R, R, R, A],
        [C, C, A],
    ]
    out = run(
        where, torch.tensor([True, True, False, False]), *packed(sequences), 4, tokens_per_cost=2.0
    )
    assert out.reflection_tokens.tolist() == [0, 2, 4, 0]
    torch.testing.assert_close(out.rewards, torch.tensor([1.0, 0.9, -0.2, 0.0]))
    mean = (1.0 + 0.9 - 0.2) / 4
    wanted = [1.0 - mean, 0.9 - mean, -0.2 - mean, -mean]
    torch.testing.assert_close(out.advantages, torch.tensor(wanted))
    mask = [s in (A, R) for sequence in sequences for s in sequence]
    assert out.loss_mask.tolist() == mask
    tokens = [a for a, sequence in zip(wanted, sequences, strict=True) for _ in sequence]
    torch.testing.assert_close(
        out.token_advantages, torch.tensor(tokens) * torch.tensor(mask, dtype=torch.float32)
    )
    assert [t.dtype for t in out] == [
        torch.int64,
        torch.float32,
        torch.float32,
        torch.float32,
        torch.bool,
    ]


def test_default_price_is_a_tenth_for_a_hundred_tokens(where):
    out = run(where, torch.tensor([1.0, 1.0]), *packed([[A] * 3, [R] * 150]), 2)
    torch.testing.assert_close(out.rewards, torch.tensor([1.0, 0.85]))
    torch.testing.assert_close(out.advantages, torch.tensor([0.075, -0.075]))


segments = st.lists(st.sampled_from(list(Segment)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(
        st.tuples(
            segments,
            st.sampled_from([0.0, 1.0, 0.5, NAN]),
            st.sampled_from([-5, 3, 2**40]),
            st.integers(0, 8).map(lambda k: k / 8),
        ),
        max_size=12,
    ),
    dtype=st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.int64]),
    eta=st.sampled_from([0.0, 0.1, 2.0]),
    tokens_per_cost=st.sampled_from([1.0, 100.0]),
    lambda_val=st.sampled_from([0.0, 0.3]),
    baseline=st.sampled_from(["mean", "leave_one_out", "none"]),
    scale=st.sampled_from(["none", "group", "batch"]),
    clip=st.sampled_from([None, 0.2]),
)
def test_matches_plain_python(
    where, batch, dtype, eta, tokens_per_cost, lambda_val, baseline, scale, clip
):
    sequences = [b[0] for b in batch]
    success = torch.tensor([b[1] for b in batch], dtype=torch.float32)
    ids = torch.tensor([b[2] for b in batch], dtype=torch.int64)
    scores = torch.tensor([b[3] for b in batch], dtype=torch.float32)
    segment_ids, cu_seqlens = packed(sequences)
    rule = {"baseline": baseline, "scale": scale, "clip": clip, "min_std": 0.01}
    out = run(
        where,
        success,
        segment_ids.to(dtype),
        cu_seqlens,
        ids,
        lambda_exec=0.7,
        eta=eta,
        tokens_per_cost=tokens_per_cost,
        verifier_scores=scores,
        lambda_val=lambda_val,
        **rule,
    )
    counts = [sequence.count(R) for sequence in sequences]
    rewards = [
        0.7 * s - eta * n / tokens_per_cost + lambda_val * v
        for s, n, v in zip(success.tolist(), counts, scores.tolist(), strict=True)
    ]
    assert out.reflection_tokens.tolist() == counts
    torch.testing.assert_close(
        out.rewards, torch.tensor(rewards, dtype=torch.float32), equal_nan=True
    )
    # the advantages are those of the rewards that were returned
    torch.testing.assert_close(
        out.advantages, group_advantages(out.rewards, ids, **rule), rtol=3e-7, atol=1e-9
    )
    trained = torch.isin(segment_ids, torch.tensor([int(A), int(R)]))
    assert torch.equal(out.loss_mask, trained)
    per_token = out.advantages.repeat_interleave(cu_seqlens.diff())
    assert torch.equal(out.token_advantages, torch.where(trained, per_token, 0.0))


def test_long_sequences_and_empty_ones(where, poisoned_empty):
    lengths = [0, 5000, 0, 1, 2049, 0]
    generator = torch.Generator().manual_seed(0)
    segment_ids = torch.randint(0, 4, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    success = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    out = run(where, success, segment_ids, cu_seqlens, 3)
    per_sequence = segment_ids.split(lengths)
    assert out.reflection_tokens.tolist() == [int((s == R).sum()) for s in per_sequence]
    for tensor in out:
        assert torch.isfinite(tensor).all()
    again = run(where, success, segment_ids, cu_seqlens, 3)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


LENGTHS = [0, 700, 3, 0, 41, 1, 1300, 0, 2, 64, 90, 5]


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "groups",
    [1, 4, 12, torch.arange(12) % 5, torch.tensor([0] * 11 + [9])],
    ids=["of 1", "of 4", "of 12", "interleaved", "11 and 1"],
)
def test_ragged_groups_match_the_reference(where, groups, dtype, scale, poisoned_empty):
    generator = torch.Generator().manual_seed(1)
    segment_ids = torch.randint(0, 4, (sum(LENGTHS),), generator=generator).to(dtype)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    success = torch.rand(len(LENGTHS), generator=generator)
    out = run(where, success, segment_ids, cu_seqlens, groups, scale=scale)
    wanted = run(("reference", "cpu"), success, segment_ids, cu_seqlens, groups, scale=scale)
    for actual, expected in zip(out, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=3e-7, atol=1e-9)


def test_thousands_of_members_in_one_group(where):
    members = 3000
    segment_ids = torch.arange(3 * members) % 4
    cu_seqlens = torch.arange(0, 3 * members + 1, 3, dtype=torch.int32)
    success = (torch.arange(members) % 3 == 0).float()
    out = run(where, success, segment_ids.to(torch.uint8), cu_seqlens, members, scale="batch")
    wanted = run(("reference", "cpu"), success, segment_ids, cu_seqlens, members, scale="batch")
    for actual, expected in zip(out, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("groups", [2, torch.tensor([5, 3, 5, 3])], ids=["size", "ids"])
@pytest.mark.skipif(not triton_interpreted(), reason="needs the interpreter of Triton")
def test_triton_launches_once(groups, monkeypatch):
    launched = []
    launch = GridExecutor.__call__

    def counted(executor, *args, **kwargs):
        launched.append(executor.fn.__name__)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    segment_ids, cu_seqlens = packed([[A, R], [C], [A], []])
    run(("triton", "cpu"), torch.ones(4), segment_ids, cu_seqlens, groups, scale="batch")
    group_advantages(torch.ones(4), groups, impl="triton")
    assert launched == ["_reflection_advantages_kernel", "_group_advantages_kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", ["triton", "cuda"] if CUDA_ARCHITECTURES else ["triton"])
@pytest.mark.parametrize("groups", [2, torch.tensor([5, 3, 5, 3])], ids=["size", "ids"])
def test_launches_once_on_a_gpu(impl, groups):
    segment_ids, cu_seqlens = (x.cuda() for x in packed([[A, R], [C], [A], []]))
    success = torch.ones(4, device="cuda")
    groups = groups.cuda() if isinstance(groups, torch.Tensor) else groups

    def op():
        reflection_advantages(success, segment_ids, cu_seqlens, groups, impl=impl)

    op()  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        op()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(on_gpu) == 1
    assert "reflection_advantages_kernel" in on_gpu[0]


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_sequences(where, tokens):
    empty = torch.zeros(0)
    segment_ids = torch.ones(tokens, dtype=torch.int64)
    if tokens:  # tokens of no sequence
        with pytest.raises(ValueError, match=r"cu_seqlens must .* end with T = 3, got 0 and 0"):
            reflection_advantages(empty, segment_ids, torch.zeros(1, dtype=torch.int32), 4)
        return
    out = run(where, empty, segment_ids, torch.zeros(1, dtype=torch.int32), 4)
    assert [list(t.shape) for t in out] == [[0]] * 5


def test_unknown_outcome_counts_for_nothing(where):
    sequences = [[A, R], [A, A], [A, R, R]]
    out = run(where, torch.tensor([1.0, NAN, 0.0]), *packed(sequences), 3)
    alone = run(where, torch.tensor([1.0, 0.0]), *packed([sequences[0], sequences[2]]), 2)
    assert out.rewards.isnan().tolist() == [False, True, False]
    assert torch.equal(out.advantages[[0, 2]], alone.advantages)
    assert out.token_advantages[2:4].tolist() == [0.0, 0.0]
    assert out.loss_mask.all()


def test_scores_are_not_read_where_their_weight_is_zero(where):
    segment_ids, cu_seqlens = packed([[A], [R]])
    success = torch.tensor([1, 0])
    out = run(where, success, segment_ids, cu_seqlens, 2, verifier_scores=torch.full((2,), NAN))
    assert torch.equal(out.rewards, run(where, success, segment_ids, cu_seqlens, 2).rewards)


def test_views(where):
    segment_ids, cu_seqlens = packed([[A, R], [A, C]])
    wide = torch.stack([segment_ids, 9 + segment_ids], 1)[:, 0]
    bounds = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 1]
    success = torch.tensor([[1.0, 5.0], [0.0, 5.0]], dtype=torch.float64)[:, 0]
    strided = run(where, success, wide, bounds, 2)
    plain = run(where, success.clone(), segment_ids, cu_seqlens, 2)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("with_scores", [False, True])
def test_opcheck(where, with_scores):
    impl, device = where
    segment_ids, cu_seqlens = packed([[A, R], [C], [A], []])
    torch.library.opcheck(
        torch.ops.regrpo_kernels.reflection_advantages.default,
        (
            torch.tensor([1.0, 0.0, 0.0, 0.5], device=device),
            segment_ids.to(device),
            cu_seqlens.to(device),
            torch.tensor([0.5, 0.25, 0.0, 1.0], device=device) if with_scores else None,
            *(1.0, 0.1, 100.0, 0.3),
            torch.tensor([3, 8, 3, 8], device=device) if with_scores else None,
            0 if with_scores else 2,
            *("leave_one_out", "batch", 1, 1e-4, 0.1, None, impl),
        ),
    )


def test_compiles_whole_and_once(where):
    impl, device = where

    @torch.compile(fullgraph=True, dynamic=True)
    def total(success, segment_ids, cu_seqlens):
        out = reflection_advantages(success, segment_ids, cu_seqlens, 2, impl=impl)
        return out.token_advantages * 2, out.loss_mask

    for repeats in (1, 2, 5):
        segment_ids, cu_seqlens = packed([[A, R, C], [A, O]] * 2 * repeats)
        success = torch.arange(4 * repeats).remainder(3).float()
        segment_ids, cu_seqlens = segment_ids.to(device), cu_seqlens.to(device)
        success = success.to(device)
        wanted = reflection_advantages(success, segment_ids, cu_seqlens, 2, impl=impl)
        with torch.compiler.set_stance("fail_on_recompile" if repeats > 1 else "default"):
            advantages, mask = total(success, segment_ids, cu_seqlens)
        torch.testing.assert_close(advantages, wanted.token_advantages * 2)
        assert torch.equal(mask, wanted.loss_mask)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": int32(1, 2, 4)}, ValueError, "cu_seqlens must begin with 0 .* got 1 and 4"),
        ({"cu_seqlens": int32(0, 2, 3)}, ValueError, "cu_seqlens .* end with T = 4, got 0 and 3"),
        (
            {"cu_seqlens": int32(0, 5, 4)},
            ValueError,
            r"cu_seqlens must not decrease, got cu_seqlens\[1\] = 5 and cu_seqlens\[2\] = 4",
        ),
        ({"cu_seqlens": int32(0, 4)}, ValueError, r"cu_seqlens .*\[B \+ 1\] = \[3\], got \[2\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, TypeError, "cu_seqlens .*int32, got torch.int64"),
        ({"cu_seqlens": int32(0, 2, 4).to("meta")}, ValueError, "cu_seqlens must be on cpu"),
        ({"segment_ids": torch.tensor([0, 1, 4, 0])}, ValueError, r"segment_ids\[2\] = 4"),
        ({"segment_ids": torch.tensor([0, -1, 3, 0])}, ValueError, r"segment_ids\[1\] = -1"),
        ({"segment_ids": torch.ones(4)}, TypeError, "segment_ids must have one of .*float32"),
        ({"segment_ids": torch.ones(2, 2, dtype=torch.int64)}, ValueError, r"segment_ids .*\[T\]"),
        ({"success": torch.ones(1, 2)}, ValueError, r"success must have shape \[B\]"),
        ({"success": torch.ones(2) * 1j}, TypeError, "success must be bool.*complex"),
        ({"success": torch.tensor([0.0, math.inf])}, ValueError, r"success\[1\] = inf"),
        ({"groups": 3}, ValueError, "groups .*divides B = 2, got 3"),
        ({"lambda_val": 0.3}, ValueError, "verifier_scores must be given"),
        (
            {"lambda_val": 0.3, "verifier_scores": torch.ones(3)},
            ValueError,
            r"verifier_scores must have shape \[2\], got \[3\]",
        ),
        (
            {"lambda_val": 0.3, "verifier_scores": torch.ones(2, dtype=torch.int64)},
            TypeError,
            "verifier_scores .*floating",
        ),
        ({"tokens_per_cost": 0.0}, ValueError, "tokens_per_cost .*greater than 0, got 0"),
        ({"eta": NAN}, ValueError, "eta must be finite, got nan"),
        ({"baseline": "max"}, ValueError, "baseline must be one of .*'max'"),
        ({"scale": "sigma"}, ValueError, "scale must be one of .*'sigma'"),
        ({"clip": -1.0}, ValueError, "clip .*got -1"),
        ({"impl": "cuda"}, (ValueError, RuntimeError), "impl='cuda'"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "success": torch.tensor([1.0, 0.0]),
        "segment_ids": torch.tensor([0, 1, 3, 0]),
        "cu_seqlens": int32(0, 2, 4),
        "groups": 2,
    }
    with pytest.raises(error, match=message):
        reflection_advantages(**{**arguments, **change})
