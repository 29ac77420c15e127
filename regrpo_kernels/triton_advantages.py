"""Triton kernels of `group_advantages` and `reflection_advantages`; imported only where Triton is
there.

Sums are kept in fp64, one a lane, and reduced once at the end: the order is fixed and does not
depend on the launch.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from regrpo_kernels.group_advantages import AdvantageRule
from regrpo_kernels.reflection_advantages import ReflectionAdvantages, Segment


@triton.jit
def _load_members(rewards_ptr, group_ids_ptr, own_id, offsets, end, HAS_IDS: tl.constexpr):
    member = offsets < end
    if HAS_IDS:
        member = member & (tl.load(group_ids_ptr + offsets, mask=member, other=0) == own_id)
    reward = tl.load(rewards_ptr + offsets, mask=member, other=0.0).to(tl.float64)
    return reward, member


@triton.jit
def _moments(
    rewards_ptr, group_ids_ptr, own_id, begin, end, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count, mean, sum of squared deviations and range of a group's rewards that are not NaN."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    for start in range(begin, end, BLOCK):
        reward, member = _load_members(
            rewards_ptr, group_ids_ptr, own_id, start + lane, end, HAS_IDS
        )
        counted = member & (reward == reward)
        count += tl.where(counted, 1.0, 0.0)
        total += tl.where(counted, reward, 0.0)
        low = tl.minimum(low, tl.where(counted, reward, float("inf")))
        high = tl.maximum(high, tl.where(counted, reward, float("-inf")))
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        reward, member = _load_members(
            rewards_ptr, group_ids_ptr, own_id, start + lane, end, HAS_IDS
        )
        deviation = tl.where(member & (reward == reward), reward - mean, 0.0)
        squares += deviation * deviation
    return n, mean, tl.sum(squares, 0), tl.max(high, 0) - tl.min(low, 0)


@triton.jit(do_not_specialize=["n_rewards", "group_size", "ddof"])
def _group_advantages_kernel(
    rewards_ptr,
    group_ids_ptr,
    advantages_ptr,
    n_rewards,
    group_size,
    ddof,
    eps: tl.float64,
    min_std: tl.float64,
    clip: tl.float64,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    own_id = program
    if HAS_IDS:
        # One program a sequence; the group belongs to its first member, all others find an earlier
        # one and stop. It costs B^2 id reads from cache and saves the sort, several launches and
        # the count of groups (a sync).
        own_id = tl.load(group_ids_ptr + program)
        earlier = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, program, BLOCK):
            offsets = start + lane
            ids = tl.load(group_ids_ptr + offsets, mask=offsets < program, other=0)
            earlier |= ((ids == own_id) & (offsets < program)).to(tl.int32)
        begin = program
        end = tl.where(tl.max(earlier, 0) > 0, program, n_rewards)
    else:
        begin = program * group_size
        end = begin + group_size

    n, mean, squares, spread = _moments(
        rewards_ptr, group_ids_ptr, own_id, begin, end, HAS_IDS, BLOCK
    )
    # A group of one and a constant group have nothing to compare: exactly 0, whatever rounding did
    # to the mean.
    factor = tl.where((n > 1) & (spread > 0), 1.0, 0.0).to(tl.float64)
    if BASELINE == "leave_one_out":
        factor *= n / tl.maximum(n - 1, 1.0)
    if BASELINE == "none":
        mean = mean * 0.0
    if SCALE != "none":
        if SCALE == "batch":
            n, _, squares, _ = _moments(
                rewards_ptr,
                group_ids_ptr,
                own_id,
                0,
                tl.where(end > begin, n_rewards, 0),
                False,
                BLOCK,
            )
        std = tl.sqrt(squares / tl.maximum(n - ddof, 1.0))
        scale = tl.maximum(std, min_std) + eps
        factor = tl.where(factor > 0, factor / tl.where(factor > 0, scale, 1.0), 0.0)

    for start in range(begin, end, BLOCK):
        offsets = start + lane
        reward, member = _load_members(rewards_ptr, group_ids_ptr, own_id, offsets, end, HAS_IDS)
        advantage = tl.where(reward == reward, (reward - mean) * factor, 0.0)
        advantage = tl.minimum(tl.maximum(advantage, -clip), clip)
        tl.store(advantages_ptr + offsets, advantage.to(tl.float32), mask=member)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    rule: AdvantageRule,
    advantages: Tensor,
) -> None:
    n_rewards = len(rewards)
    if n_rewards == 0:
        return
    has_ids = group_ids is not None
    span = n_rewards if has_ids else group_size
    _group_advantages_kernel[(n_rewards if has_ids else n_rewards // group_size,)](
        rewards,
        group_ids,
        advantages,
        n_rewards,
        group_size,
        rule.ddof,
        rule.eps,
        rule.min_std,
        math.inf if rule.clip is None else rule.clip,
        BASELINE=rule.baseline,
        SCALE=rule.scale,
        HAS_IDS=has_ids,
        BLOCK=1024 if span > 32 else 32,
    )


@triton.jit
def _reflection_rewards_kernel(
    success_ptr,
    verifier_scores_ptr,
    segment_ids_ptr,
    cu_seqlens_ptr,
    reflection_tokens_ptr,
    rewards_ptr,
    lambda_exec: tl.float64,
    eta: tl.float64,
    tokens_per_cost: tl.float64,
    lambda_val: tl.float64,
    HAS_VERIFIER: tl.constexpr,
    REFLECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(begin, end, BLOCK):
        offsets = start + lane
        segment = tl.load(segment_ids_ptr + offsets, mask=offsets < end, other=0)
        count += (segment == REFLECTION).to(tl.int64)
    reflection_tokens = tl.sum(count, 0)
    reward = lambda_exec * tl.load(success_ptr + sequence).to(tl.float64)
    reward -= eta * (reflection_tokens.to(tl.float64) / tokens_per_cost)
    if HAS_VERIFIER:
        reward += lambda_val * tl.load(verifier_scores_ptr + sequence).to(tl.float64)
    tl.store(reflection_tokens_ptr + sequence, reflection_tokens)
    tl.store(rewards_ptr + sequence, reward.to(tl.float32))


@triton.jit
def _token_advantages_kernel(
    advantages_ptr,
    segment_ids_ptr,
    cu_seqlens_ptr,
    token_advantages_ptr,
    loss_mask_ptr,
    ACTION: tl.constexpr,
    REFLECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    advantage = tl.load(advantages_ptr + sequence)
    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        offsets = start + lane
        segment = tl.load(segment_ids_ptr + offsets, mask=offsets < end, other=0)
        trained = (segment == ACTION) | (segment == REFLECTION)
        tl.store(loss_mask_ptr + offsets, trained, mask=offsets < end)
        tl.store(
            token_advantages_ptr + offsets, tl.where(trained, advantage, 0.0), mask=offsets < end
        )


def reflection_advantages(
    success: Tensor,
    segment_ids: Tensor,
    cu_seqlens: Tensor,
    verifier_scores: Tensor | None,
    lambda_exec: float,
    eta: float,
    tokens_per_cost: float,
    lambda_val: float,
    group_ids: Tensor | None,
    group_size: int,
    rule: AdvantageRule,
    outputs: ReflectionAdvantages,
) -> None:
    grid = (len(success),)
    if grid == (0,):
        return
    _reflection_rewards_kernel[grid](
        success,
        verifier_scores,
        segment_ids,
        cu_seqlens,
        outputs.reflection_tokens,
        outputs.rewards,
        lambda_exec,
        eta,
        tokens_per_cost,
        lambda_val,
        HAS_VERIFIER=verifier_scores is not None,
        REFLECTION=int(Segment.REFLECTION),
        BLOCK=1024,
    )
    group_advantages(outputs.rewards, group_ids, group_size, rule, outputs.advantages)
    _token_advantages_kernel[grid](
        outputs.advantages,
        segment_ids,
        cu_seqlens,
        outputs.token_advantages,
        outputs.loss_mask,
        ACTION=int(Segment.ACTION),
        REFLECTION=int(Segment.REFLECTION),
        BLOCK=1024,
    )
