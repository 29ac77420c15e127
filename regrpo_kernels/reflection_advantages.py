"""Segment ids -> reflection cost -> reward -> group advantage -> token advantages and loss mask.

    C = reflection tokens / tokens_per_cost
    R = lambda_exec * success - eta * C + lambda_val * V

The reward and the advantage within a group of trajectories from one state are those of ReGRPO
(arXiv 2606.31392). A trajectory that needed a reflection and one that did not are compared through
R: reflecting pays where it turns a failure into a success, and costs where it was not needed.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import choose_impl, compiled, device_guard, launch, library, pointer
from regrpo_kernels.group_advantages import (
    AdvantageRule,
    check_groups,
    reference_group_advantages,
)


class Segment(IntEnum):
    """What a token belongs to. ACTION and REFLECTION are the policy's own words and are trained."""

    CONTEXT = 0
    ACTION = 1
    OBSERVATION = 2
    REFLECTION = 3


class ReflectionAdvantages(NamedTuple):
    """Of B sequences and T packed tokens.

    Attributes:
        reflection_tokens: int64 `[B]`, REFLECTION tokens in the sequence.
        rewards: float32 `[B]`, R.
        advantages: float32 `[B]`, `group_advantages(rewards, ...)`.
        token_advantages: float32 `[T]`, the sequence's advantage on trained tokens, 0 on others.
        loss_mask: bool `[T]`, True on ACTION and REFLECTION.
    """

    reflection_tokens: Tensor
    rewards: Tensor
    advantages: Tensor
    token_advantages: Tensor
    loss_mask: Tensor


def reference_reflection_advantages(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The readable specification: rewards in fp64, rounded once, then the advantages of those."""
    lengths = cu_seqlens.diff()
    sequence_of_token = torch.arange(len(success), device=success.device).repeat_interleave(lengths)
    is_reflection = segment_ids == Segment.REFLECTION
    reflection_tokens = sequence_of_token[is_reflection].bincount(minlength=len(success))
    rewards = lambda_exec * success.double() - eta * (reflection_tokens.double() / tokens_per_cost)
    if verifier_scores is not None:
        rewards = rewards + lambda_val * verifier_scores.double()
    rewards = rewards.float()
    advantages = reference_group_advantages(rewards, group_ids, group_size, rule)
    loss_mask = is_reflection | (segment_ids == Segment.ACTION)
    token_advantages = advantages[sequence_of_token].masked_fill(~loss_mask, 0.0)
    return reflection_tokens, rewards, advantages, token_advantages, loss_mask


library.define(
    "reflection_advantages(Tensor success, Tensor segment_ids, Tensor cu_seqlens, Tensor? "
    "verifier_scores, float lambda_exec, float eta, float tokens_per_cost, float lambda_val, "
    "Tensor? group_ids, int group_size, str baseline, str scale, int ddof, float eps, float "
    "min_std, float? clip, str impl) -> (Tensor reflection_tokens, Tensor rewards, Tensor "
    "advantages, Tensor token_advantages, Tensor loss_mask)"
)


def _outputs(success: Tensor, segment_ids: Tensor) -> ReflectionAdvantages:
    return ReflectionAdvantages(
        reflection_tokens=torch.empty_like(success, dtype=torch.int64),
        rewards=torch.empty_like(success),
        advantages=torch.empty_like(success),
        token_advantages=torch.empty_like(segment_ids, dtype=torch.float32),
        loss_mask=torch.empty_like(segment_ids, dtype=torch.bool),
    )


@torch.library.register_fake("regrpo_kernels::reflection_advantages", lib=library)
def _(success, segment_ids, *arguments):
    return tuple(_outputs(success, segment_ids))


def _check_values(
    success: Tensor, segment_ids: Tensor, cu_seqlens: Tensor, verifier_scores: Tensor | None
) -> None:
    for name, values in (("success", success), ("verifier_scores", verifier_scores)):
        if values is not None and values.isinf().any():
            index = int(values.isinf().nonzero()[0])
            raise ValueError(f"{name} must not be infinite, got {name}[{index}] = {values[index]}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(segment_ids):
        raise ValueError(
            f"cu_seqlens must begin with 0 and end with T = {len(segment_ids)}, "
            f"got {int(cu_seqlens[0])} and {int(cu_seqlens[-1])}"
        )
    if (cu_seqlens.diff() < 0).any():
        index = int((cu_seqlens.diff() < 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens must not decrease, got cu_seqlens[{index}] = {int(cu_seqlens[index])} and "
            f"cu_seqlens[{index + 1}] = {int(cu_seqlens[index + 1])}"
        )
    if len(segment_ids) == 0:
        return
    low, high = segment_ids.aminmax()
    for extreme in (int(low), int(high)):
        if not min(Segment) <= extreme <= max(Segment):
            index = int((segment_ids == extreme).nonzero()[0])
            raise ValueError(
                f"segment_ids must be Segment values, {int(min(Segment))} to {int(max(Segment))}, "
                f"got segment_ids[{index}] = {extreme}"
            )


@torch.library.impl("regrpo_kernels::reflection_advantages", ("cpu", "cuda"), lib=library)
def _reflection_advantages(
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
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    min_std: float,
    clip: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if success.device.type == "cpu":
        _check_values(success, segment_ids, cu_seqlens, verifier_scores)
    rule = AdvantageRule(baseline, scale, ddof, eps, min_std, clip)
    weights = (lambda_exec, eta, tokens_per_cost, lambda_val)
    inputs = (success, segment_ids, cu_seqlens, verifier_scores)
    if impl == "reference":
        return reference_reflection_advantages(*inputs, *weights, group_ids, group_size, rule)
    outputs = _outputs(success, segment_ids)
    with device_guard(success):
        if impl == "triton":
            from regrpo_kernels import triton_advantages

            triton_advantages.reflection_advantages(
                *inputs, *weights, group_ids, group_size, rule, outputs
            )
        else:
            compiled().reflection_advantages(
                sequences=len(success),
                tokens=len(segment_ids),
                success=pointer(success),
                verifier_scores=pointer(verifier_scores),
                segment_ids=pointer(segment_ids),
                segment_id_bytes=segment_ids.element_size(),
                cu_seqlens=pointer(cu_seqlens),
                lambda_exec=lambda_exec,
                eta=eta,
                tokens_per_cost=tokens_per_cost,
                lambda_val=lambda_val,
                group_ids=pointer(group_ids),
                group_size=group_size,
                **rule.compiled(),
                **{name: pointer(output) for name, output in outputs._asdict().items()},
                stream=launch(success)["stream"],
            )
    return tuple(outputs)  # type: ignore[return-value]


SEGMENT_DTYPES = (torch.int8, torch.uint8, torch.int32, torch.int64)


def reflection_advantages(
    success: Tensor,
    segment_ids: Tensor,
    cu_seqlens: Tensor,
    groups: int | Tensor,
    *,
    lambda_exec: float = 1.0,
    eta: float = 0.1,
    tokens_per_cost: float = 100.0,
    verifier_scores: Tensor | None = None,
    lambda_val: float = 0.0,
    baseline: str = "mean",
    scale: str = "none",
    min_std: float = 0.0,
    clip: float | None = None,
    impl: str | None = None,
) -> ReflectionAdvantages:
    """Rewards with reflection cost, and their group advantages on every trained token; carries no
    gradient.

    On CPU the values of `segment_ids` and `cu_seqlens` are checked. On GPU they are not, because
    looking at them would wait for the device: a token with an unknown segment id is not trained,
    and tokens outside `cu_seqlens` are left unwritten.

    Args:
        success: `[B]`, bool, integer or floating; taken as float32. NaN: unknown, counts for
            nothing, advantage 0.
        segment_ids: `[T]`, int8, uint8, int32 or int64, one `Segment` a token.
        cu_seqlens: `[B + 1]`, int32; sequence b has the tokens `cu_seqlens[b]:cu_seqlens[b + 1]`.
            From 0 to T.
        groups: group size or int64 ids `[B]`, as in `group_advantages`.
        lambda_exec: weight of success.
        eta: price of one unit of reflection cost, in units of reward.
        tokens_per_cost: REFLECTION tokens in one unit of cost.
        verifier_scores: V, `[B]`, floating; needed where `lambda_val` is not 0.
        lambda_val: weight of V; at 0, V is not read.
        baseline, scale, min_std, clip: as in `group_advantages`, with its default `ddof` and `eps`.
        impl: None (the best one present), "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
    """
    rule = AdvantageRule(baseline, scale, ddof=1, eps=1e-4, min_std=min_std, clip=clip)
    rule.check()
    for name, weight in (("lambda_exec", lambda_exec), ("eta", eta), ("lambda_val", lambda_val)):
        if not -math.inf < weight < math.inf:
            raise ValueError(f"{name} must be finite, got {weight}")
    if not 0 < tokens_per_cost < math.inf:
        raise ValueError(
            f"tokens_per_cost must be finite and greater than 0, got {tokens_per_cost}"
        )
    if success.dim() != 1:
        raise ValueError(f"success must have shape [B], got {list(success.shape)}")
    if success.is_complex():
        raise TypeError(f"success must be bool, integer or floating, got {success.dtype}")
    sequences = success.shape[0]
    if segment_ids.dim() != 1:
        raise ValueError(f"segment_ids must have shape [T], got {list(segment_ids.shape)}")
    if segment_ids.dtype not in SEGMENT_DTYPES:
        raise TypeError(f"segment_ids must have one of {SEGMENT_DTYPES}, got {segment_ids.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.shape != (sequences + 1,):
        raise ValueError(
            f"cu_seqlens must have shape [B + 1] = [{sequences + 1}], got {list(cu_seqlens.shape)}"
        )
    if lambda_val == 0:
        verifier_scores = None
    elif verifier_scores is None:
        raise ValueError(f"verifier_scores must be given where lambda_val = {lambda_val}, got None")
    elif verifier_scores.shape != (sequences,):
        raise ValueError(
            f"verifier_scores must have shape [{sequences}], got {list(verifier_scores.shape)}"
        )
    elif not verifier_scores.is_floating_point():
        raise TypeError(f"verifier_scores must have a floating dtype, got {verifier_scores.dtype}")
    else:
        verifier_scores = verifier_scores.detach().float().contiguous()
    for name, tensor in (
        ("segment_ids", segment_ids),
        ("cu_seqlens", cu_seqlens),
        ("verifier_scores", verifier_scores),
    ):
        if tensor is not None and tensor.device != success.device:
            raise ValueError(f"{name} must be on {success.device}, got a tensor on {tensor.device}")
    group_ids, group_size = check_groups(groups, success)
    return ReflectionAdvantages(
        *torch.ops.regrpo_kernels.reflection_advantages(
            success.detach().float().contiguous(),
            segment_ids.contiguous(),
            cu_seqlens.contiguous(),
            verifier_scores,
            lambda_exec,
            eta,
            tokens_per_cost,
            lambda_val,
            group_ids,
            group_size,
            *rule,
            choose_impl(impl, success.device),
        )
    )
