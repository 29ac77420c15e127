"""Triton kernels of `group_advantages` and `reflection_advantages`, one launch an op; imported only
where Triton is there.

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


@triton.jit
def _group_of_program(
    group_ids_ptr, n_sequences, group_size, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """`(own_id, begin, end)`: the sequences in [begin, end), those with own_id where there are ids.

    With ids there is one program a sequence; the group belongs to its first member, all others find
    an earlier one and get no sequences. It costs B^2 id reads from cache and saves the sort,
    several launches and the count of groups (a sync).
    """
    program = tl.program_id(0).to(tl.int64)
    own_id = program
    if HAS_IDS:
        lane = tl.arange(0, BLOCK).to(tl.int64)
        own_id = tl.load(group_ids_ptr + program)
        earlier = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, program, BLOCK):
            offsets = start + lane
            ids = tl.load(group_ids_ptr + offsets, mask=offsets < program, other=0)
            earlier |= ((ids == own_id) & (offsets < program)).to(tl.int32)
        begin = program
        end = tl.where(tl.max(earlier, 0) > 0, program, n_sequences)
    else:
        begin = program * group_size
        end = begin + group_size
    return own_id, begin, end


@triton.jit
def _write_advantages(
    rewards_ptr,
    group_ids_ptr,
    advantages_ptr,
    own_id,
    begin,
    end,
    n_sequences,
    ddof,
    eps,
    min_std,
    clip,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
            all_end = tl.where(end > begin, n_sequences, 0)
            n, _, squares, _ = _moments(
                rewards_ptr, group_ids_ptr, own_id, 0, all_end, False, BLOCK
            )
        std = tl.sqrt(squares / tl.maximum(n - ddof, 1.0))
        scale = tl.maximum(std, min_std) + eps
        factor = tl.where(factor > 0, factor / tl.where(factor > 0, scale, 1.0), 0.0)

    lane = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        offsets = start + lane
        reward, member = _load_members(rewards_ptr, group_ids_ptr, own_id, offsets, end, HAS_IDS)
        advantage = tl.where(reward == reward, (reward - mean) * factor, 0.0)
        advantage = tl.minimum(tl.maximum(advantage, -clip), clip)
        tl.store(advantages_ptr + offsets, advantage.to(tl.float32), mask=member)


@triton.jit(do_not_specialize=["n_sequences", "group_size", "ddof"])
def _group_advantages_kernel(
    rewards_ptr,
    group_ids_ptr,
    advantages_ptr,
    n_sequences,
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
    own_id, begin, end = _group_of_program(group_ids_ptr, n_sequences, group_size, HAS_IDS, BLOCK)
    _write_advantages(
        rewards_ptr,
        group_ids_ptr,
        advantages_ptr,
        own_id,
        begin,
        end,
        n_sequences,
        ddof,
        eps,
        min_std,
        clip,
        BASELINE,
        SCALE,
        HAS_IDS,
        BLOCK,
    )


def _grid(sequences: int, group_ids: Tensor | None, group_size: int) -> tuple[int]:
    return (sequences if group_ids is not None else sequences // group_size,)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    rule: AdvantageRule,
    advantages: Tensor,
) -> None:
    n_sequences = len(rewards)
    if n_sequences == 0:
        return
    has_ids = group_ids is not None
    _group_advantages_kernel[_grid(n_sequences, group_ids, group_size)](
        rewards,
        group_ids,
        advantages,
        n_sequences,
        group_size,
        rule.ddof,
        rule.eps,
        rule.min_std,
        math.inf if rule.clip is None else rule.clip,
        BASELINE=rule.baseline,
        SCALE=rule.scale,
        HAS_IDS=has_ids,
        BLOCK=1024 if max(n_sequences if has_ids else 0, group_size) > 32 else 32,
    )


@triton.jit
def _load_rows(group_ids_ptr, cu_seqlens_ptr, own_id, rows, end, HAS_IDS: tl.constexpr):
    """Bounds of the tokens of some sequences, no tokens for those outside the group."""
    member = rows < end
    if HAS_IDS:
        member = member & (tl.load(group_ids_ptr + rows, mask=member, other=0) == own_id)
    first = tl.load(cu_seqlens_ptr + rows, mask=member, other=0).to(tl.int64)
    last = tl.load(cu_seqlens_ptr + rows + 1, mask=member, other=0).to(tl.int64)
    return first, last, member


@triton.jit
def _write_rewards(
    success_ptr,
    verifier_scores_ptr,
    segment_ids_ptr,
    cu_seqlens_ptr,
    group_ids_ptr,
    reflection_tokens_ptr,
    rewards_ptr,
    own_id,
    begin,
    end,
    lambda_exec,
    eta,
    tokens_per_cost,
    lambda_val,
    HAS_IDS: tl.constexpr,
    HAS_VERIFIER: tl.constexpr,
    REFLECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    for row in range(begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        first, last, member = _load_rows(group_ids_ptr, cu_seqlens_ptr, own_id, rows, end, HAS_IDS)
        count = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(0, tl.max(last - first, 0), COLUMNS):
            offsets = first[:, None] + start + column[None, :]
            inside = offsets < last[:, None]
            segment = tl.load(segment_ids_ptr + offsets, mask=inside, other=0)
            count += (segment == REFLECTION).to(tl.int32)
        reflection_tokens = tl.sum(count, 1)
        reward = lambda_exec * tl.load(success_ptr + rows, mask=member, other=0).to(tl.float64)
        reward -= eta * (reflection_tokens.to(tl.float64) / tokens_per_cost)
        if HAS_VERIFIER:
            score = tl.load(verifier_scores_ptr + rows, mask=member, other=0).to(tl.float64)
            reward += lambda_val * score
        tl.store(reflection_tokens_ptr + rows, reflection_tokens.to(tl.int64), mask=member)
        tl.store(rewards_ptr + rows, reward.to(tl.float32), mask=member)


@triton.jit
def _write_tokens(
    segment_ids_ptr,
    cu_seqlens_ptr,
    group_ids_ptr,
    advantages_ptr,
    token_advantages_ptr,
    loss_mask_ptr,
    own_id,
    begin,
    end,
    HAS_IDS: tl.constexpr,
    ACTION: tl.constexpr,
    REFLECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    for row in range(begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        first, last, member = _load_rows(group_ids_ptr, cu_seqlens_ptr, own_id, rows, end, HAS_IDS)
        advantage = tl.load(advantages_ptr + rows, mask=member, other=0.0)
        for start in range(0, tl.max(last - first, 0), COLUMNS):
            offsets = first[:, None] + start + column[None, :]
            inside = offsets < last[:, None]
            segment = tl.load(segment_ids_ptr + offsets, mask=inside, other=0)
            trained = (segment == ACTION) | (segment == REFLECTION)
            tl.store(loss_mask_ptr + offsets, trained, mask=inside)
            token_advantage = tl.where(trained, advantage[:, None], 0.0)
            tl.store(token_advantages_ptr + offsets, token_advantage, mask=inside)


@triton.jit(do_not_specialize=["n_sequences", "group_size", "ddof"])
def _reflection_advantages_kernel(
    success_ptr,
    verifier_scores_ptr,
    segment_ids_ptr,
    cu_seqlens_ptr,
    group_ids_ptr,
    reflection_tokens_ptr,
    rewards_ptr,
    advantages_ptr,
    token_advantages_ptr,
    loss_mask_ptr,
    n_sequences,
    group_size,
    ddof,
    lambda_exec: tl.float64,
    eta: tl.float64,
    tokens_per_cost: tl.float64,
    lambda_val: tl.float64,
    eps: tl.float64,
    min_std: tl.float64,
    clip: tl.float64,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_VERIFIER: tl.constexpr,
    ACTION: tl.constexpr,
    REFLECTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program counts, rewards, compares and broadcasts for all sequences of its group, so nothing
    waits for another program. The standard deviation of the batch needs all rewards: every program
    then computes them all, and writes the same bits.
    """
    own_id, begin, end = _group_of_program(group_ids_ptr, n_sequences, group_size, HAS_IDS, BLOCK)
    rewarded_begin, rewarded_end = begin, end
    if SCALE == "batch":
        rewarded_begin, rewarded_end = begin * 0, tl.where(end > begin, n_sequences, 0)
    _write_rewards(
        success_ptr,
        verifier_scores_ptr,
        segment_ids_ptr,
        cu_seqlens_ptr,
        group_ids_ptr,
        reflection_tokens_ptr,
        rewards_ptr,
        own_id,
        rewarded_begin,
        rewarded_end,
        lambda_exec,
        eta,
        tokens_per_cost,
        lambda_val,
        HAS_IDS and SCALE != "batch",
        HAS_VERIFIER,
        REFLECTION,
        ROWS,
        COLUMNS,
    )
    tl.debug_barrier()  # other threads of the program read these rewards, and below the advantages
    _write_advantages(
        rewards_ptr,
        group_ids_ptr,
        advantages_ptr,
        own_id,
        begin,
        end,
        n_sequences,
        ddof,
        eps,
        min_std,
        clip,
        BASELINE,
        SCALE,
        HAS_IDS,
        BLOCK,
    )
    tl.debug_barrier()
    _write_tokens(
        segment_ids_ptr,
        cu_seqlens_ptr,
        group_ids_ptr,
        advantages_ptr,
        token_advantages_ptr,
        loss_mask_ptr,
        own_id,
        begin,
        end,
        HAS_IDS,
        ACTION,
        REFLECTION,
        ROWS,
        COLUMNS,
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
    n_sequences = len(success)
    if n_sequences == 0:
        return
    # a tile of sequences x tokens: few sequences, and more of each, where the groups are small
    rows = 8 if 0 < group_size <= 8 else 32
    _reflection_advantages_kernel[_grid(n_sequences, group_ids, group_size)](
        success,
        verifier_scores,
        segment_ids,
        cu_seqlens,
        group_ids,
        *outputs,
        n_sequences,
        group_size,
        rule.ddof,
        lambda_exec,
        eta,
        tokens_per_cost,
        lambda_val,
        rule.eps,
        rule.min_std,
        math.inf if rule.clip is None else rule.clip,
        BASELINE=rule.baseline,
        SCALE=rule.scale,
        HAS_IDS=group_ids is not None,
        HAS_VERIFIER=verifier_scores is not None,
        ACTION=int(Segment.ACTION),
        REFLECTION=int(Segment.REFLECTION),
        ROWS=rows,
        COLUMNS=4096 // rows,
        BLOCK=1024,
        num_warps=8,
    )
