"""group_advantages: every implementation against fp64 in plain Python, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrpo_kernels import group_advantages

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("none", "group", "batch")
NAN = float("nan")


def expected(
    rewards, ids, baseline="mean", scale="group", ddof=1, eps=1e-4, min_std=0.0, clip=None
):
    """The definition, in Python floats with exact sums."""

    def std(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))

    counted = [r for r in rewards if not math.isnan(r)]
    groups = {}
    for r, g in zip(rewards, ids, strict=True):
        groups.setdefault(g, [])
        if not math.isnan(r):
            groups[g].append(r)
    varying = {g: rs for g, rs in groups.items() if rs and min(rs) < max(rs)}
    total = {g: math.fsum(rs) for g, rs in varying.items()}
    divisor = dict.fromkeys(varying, 1.0)
    for g, rs in varying.items():
        if scale != "none":
            divisor[g] = max(std(rs if scale == "group" else counted), min_std) + eps
    out = []
    for r, g in zip(rewards, ids, strict=True):
        if math.isnan(r) or g not in varying:
            out.append(0.0)
            continue
        n = len(varying[g])
        middle = {"mean": total[g] / n, "leave_one_out": (total[g] - r) / (n - 1), "none": 0.0}
        a = (r - middle[baseline]) / divisor[g]
        out.append(a if clip is None else min(max(a, -clip), clip))
    return torch.tensor(out, dtype=torch.float64)


def run(where, rewards, groups, **options):
    impl, device = where
    if isinstance(groups, torch.Tensor):
        groups = groups.to(device)
    return group_advantages(rewards.to(device), groups, impl=impl, **options).cpu()


def assert_matches(actual, wanted):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), wanted, rtol=3e-7, atol=1e-9)
    assert torch.equal(actual == 0, wanted.float() == 0)  # exactly 0 where the definition says so


# multiples of 1/8: sums are exact, so whether a group varies is not a matter of rounding
reward_values = st.one_of(st.integers(-800, 800).map(lambda k: k / 8), st.just(NAN))
batches = st.lists(
    st.tuples(reward_values, st.sampled_from([-(2**63), -1, 0, 7, 2**63 - 1])), max_size=20
)
options = st.fixed_dictionaries(
    {
        "baseline": st.sampled_from(BASELINES),
        "scale": st.sampled_from(SCALES),
        "ddof": st.sampled_from([0, 1]),
        "eps": st.sampled_from([0.0, 1e-4, 0.5]),
        "min_std": st.sampled_from([0.0, 0.3, 50.0]),
        "clip": st.sampled_from([None, 0.7, 3.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(batch=batches, options=options)
def test_ids_in_any_order_match_fp64(where, batch, options):
    rewards = torch.tensor([r for r, _ in batch], dtype=torch.float32)
    ids = torch.tensor([g for _, g in batch], dtype=torch.int64)
    actual = run(where, rewards, ids, **options)
    assert_matches(actual, expected(rewards.tolist(), ids.tolist(), **options))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(
    ("sequences", "size"), [(0, 4), (5, 1), (24, 8), (33, 33), (70, 35), (6000, 2000)]
)
def test_equal_groups_match_fp64(where, baseline, scale, sequences, size):
    generator = torch.Generator().manual_seed(sequences)
    rewards = torch.randn(sequences, generator=generator)
    rewards[::7] = NAN
    actual = run(where, rewards, size, baseline=baseline, scale=scale)
    ids = [k // size for k in range(sequences)]
    assert_matches(actual, expected(rewards.tolist(), ids, baseline=baseline, scale=scale))
    if where != ("triton", "cpu") or sequences < 40:  # 5 ms a sequence under the interpreter
        by_id = run(
            where, rewards, torch.tensor(ids, dtype=torch.int64), baseline=baseline, scale=scale
        )
        assert_matches(by_id, expected(rewards.tolist(), ids, baseline=baseline, scale=scale))


def test_by_hand(where):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(
        run(where, rewards, 4, scale="none"), torch.tensor([0.5, -0.5, -0.5, 0.5])
    )
    torch.testing.assert_close(
        run(where, rewards, 4, eps=0.0, ddof=0), torch.tensor([1.0, -1.0, -1.0, 1.0])
    )
    torch.testing.assert_close(
        run(where, rewards, 4, eps=0.0), torch.tensor([1.0, -1.0, -1.0, 1.0]) * math.sqrt(3) / 2
    )
    torch.testing.assert_close(
        run(where, rewards, 4, baseline="leave_one_out", scale="none"),
        torch.tensor([2.0, -2.0, -2.0, 2.0]) / 3,
    )
    torch.testing.assert_close(run(where, rewards, 4, baseline="none", scale="none"), rewards)
    torch.testing.assert_close(
        run(where, rewards, 4, scale="group", min_std=2.0, eps=0.0), (rewards - 0.5) / 2
    )
    torch.testing.assert_close(
        run(where, rewards, 4, scale="none", clip=0.25), (rewards - 0.5).clamp(-0.25, 0.25)
    )


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_nothing_to_compare_is_exactly_zero(where, baseline, scale):
    # 0.1 x 3 does not average to 0.1 in floating point; then a group of one, one member and a
    # NaN, and a group of NaN
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.7, NAN, NAN, NAN, 1.0, 2.0])
    ids = torch.tensor([4, 4, 4, 9, 2, 2, 3, 3, 0, 0])
    actual = run(where, rewards, ids, baseline=baseline, scale=scale, eps=0.0)
    assert torch.equal(actual[:8], torch.zeros(8))
    assert (actual[8:] != 0).all()


def test_small_differences_on_a_large_reward(where):
    offset = torch.tensor([1.0, 2.0, 4.0, 3.0, 3.0, 9.0]) / 64
    rewards = 2.0**17 + offset  # exact in fp32; squares in fp32 would lose everything
    torch.testing.assert_close(run(where, rewards, 3), run(where, offset, 3), rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    rewards=st.lists(reward_values, min_size=12, max_size=12),
    shift=st.integers(-100, 100),
    order=st.permutations(range(4)),
    scale=st.sampled_from(SCALES),
)
def test_symmetries(where, rewards, shift, order, scale):
    rewards = torch.tensor(rewards)
    actual = run(where, rewards, 3, scale=scale)
    # adding a constant to all rewards changes nothing
    torch.testing.assert_close(
        run(where, rewards + shift, 3, scale=scale), actual, rtol=1e-5, atol=1e-6
    )
    # permuting groups permutes advantages
    permuted = run(where, rewards.view(4, 3)[list(order)].reshape(-1), 3, scale=scale)
    torch.testing.assert_close(permuted.view(4, 3), actual.view(4, 3)[list(order)])
    # leave-one-out is n / (n - 1) times the mean baseline
    n = (~rewards.view(4, 3).isnan()).sum(1, keepdim=True)
    ratio = torch.where(n > 1, n / (n - 1).clamp(min=1), 1.0)
    left_out = run(where, rewards, 3, scale=scale, baseline="leave_one_out")
    torch.testing.assert_close(left_out.view(4, 3), actual.view(4, 3) * ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize("groups", [3, torch.tensor([1, 0, 1, 0, 2, 1])], ids=["size", "ids"])
def test_bits_repeat_and_outputs_are_written(where, groups, poisoned_empty):
    rewards = torch.tensor([0.3, 0.1, NAN, 0.9, 0.7, 0.2])
    first = run(where, rewards, groups)
    assert torch.isfinite(first).all()
    for _ in range(3):
        assert torch.equal(run(where, rewards, groups), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_views(where, dtype):
    rewards = torch.tensor([[0.5, 9.0], [0.25, 9.0], [1.0, 9.0], [2.0, 9.0]], dtype=dtype)[:, 0]
    ids = torch.tensor([[0, 5], [1, 5], [0, 5], [1, 5]])[:, 0]
    assert_matches(run(where, rewards, ids), expected(rewards.tolist(), ids.tolist()))


def test_no_gradient():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not group_advantages(rewards, 2).requires_grad


@pytest.mark.parametrize("groups", [2, torch.tensor([8, 8, 3, 3])], ids=["size", "ids"])
def test_opcheck(where, groups):
    impl, device = where
    ids = groups.to(device) if isinstance(groups, torch.Tensor) else None
    torch.library.opcheck(
        torch.ops.regrpo_kernels.group_advantages.default,
        (
            torch.tensor([1.0, 0.0, 0.5, 0.5], device=device),
            ids,
            0 if ids is not None else groups,
            *("mean", "group", 1, 1e-4, 0.0, 2.0, impl),
        ),
    )


def test_compiles_whole_and_once(where):
    impl, device = where

    @torch.compile(fullgraph=True, dynamic=True)
    def doubled(rewards, ids):
        by_size = group_advantages(rewards, 2, impl=impl)
        return 2 * by_size + group_advantages(rewards, ids, clip=1.0, impl=impl)

    for sequences in (4, 6, 10):
        rewards = torch.arange(sequences, device=device).float().sin()
        ids = torch.arange(sequences, device=device) % 2
        wanted = 2 * group_advantages(rewards, 2, impl=impl)
        wanted += group_advantages(rewards, ids, clip=1.0, impl=impl)
        with torch.compiler.set_stance("fail_on_recompile" if sequences > 4 else "default"):
            torch.testing.assert_close(doubled(rewards, ids), wanted)


@pytest.mark.parametrize(
    ("rewards", "groups", "options", "error", "message"),
    [
        (torch.ones(2, 2), 2, {}, ValueError, r"rewards must have shape \[B\], got \[2, 2\]"),
        (torch.ones(4, dtype=torch.int64), 2, {}, TypeError, "rewards .*floating.*int64"),
        (torch.ones(4), 3, {}, ValueError, "groups .*divides B = 4, got 3"),
        (torch.ones(4), 0, {}, ValueError, "groups .*at least 1.*got 0"),
        (torch.ones(4), True, {}, TypeError, "groups must be an int .*got bool"),
        (torch.ones(4), 2.0, {}, TypeError, "groups must be an int .*got float"),
        (torch.ones(4), torch.zeros(4), {}, TypeError, "groups .*int64, got torch.float32"),
        (
            torch.ones(4),
            torch.zeros(3, dtype=torch.int64),
            {},
            ValueError,
            r"groups .*\[4\], got \[3\]",
        ),
        (
            torch.ones(4),
            torch.zeros(4, dtype=torch.int64, device="meta"),
            {},
            ValueError,
            "groups must be on cpu, got .*meta",
        ),
        (
            torch.ones(4),
            2,
            {"baseline": "median"},
            ValueError,
            "baseline must be one of .*'median'",
        ),
        (torch.ones(4), 2, {"scale": "std"}, ValueError, "scale must be one of .*'std'"),
        (torch.ones(4), 2, {"ddof": 2}, ValueError, "ddof must be one of .*got 2"),
        (torch.ones(4), 2, {"eps": -1.0}, ValueError, "eps .*got -1"),
        (torch.ones(4), 2, {"min_std": NAN}, ValueError, "min_std .*got nan"),
        (torch.ones(4), 2, {"clip": 0.0}, ValueError, "clip .*got 0"),
        (torch.ones(4), 2, {"impl": "numpy"}, ValueError, "impl .*'numpy'"),
        (torch.tensor([0.0, math.inf]), 2, {}, ValueError, r"rewards\[1\] = inf"),
    ],
)
def test_bad_arguments(rewards, groups, options, error, message):
    with pytest.raises(error, match=message):
        group_advantages(rewards, groups, **options)
