"""Group-relative advantages: rewards of trajectories that share a state -> one advantage each.

    A_i = (R_i - baseline) / (max(std, min_std) + eps), clipped to [-clip, clip]

Mean baseline: GRPO (arXiv 2402.03300, section 4.1.2). Leave-one-out baseline: RLOO (arXiv
2402.14740, section 2.2). `scale="none"`: Dr. GRPO (arXiv 2503.20783). Every implementation
accumulates in fp64, in two passes and in a fixed order, and rounds once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import choose_impl, compiled, device_guard, launch, library, pointer

BASELINES = ("mean", "leave_one_out", "none")  # in the order of csrc/ops.h
SCALES = ("none", "group", "batch")


class AdvantageRule(NamedTuple):
    """How rewards become advantages, once their groups are known."""

    baseline: str
    scale: str
    ddof: int
    eps: float
    min_std: float
    clip: float | None

    def check(self) -> None:
        for name, value, allowed in (
            ("baseline", self.baseline, BASELINES),
            ("scale", self.scale, SCALES),
            ("ddof", self.ddof, (0, 1)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        for name, bound in (("eps", self.eps), ("min_std", self.min_std)):
            if not 0 <= bound < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {bound}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(
                f"clip must be greater than 0, or None for no clipping, got {self.clip}"
            )

    def compiled(self) -> dict[str, float]:
        """As the compiled module takes it."""
        return {
            "baseline": BASELINES.index(self.baseline),
            "scale": SCALES.index(self.scale),
            "ddof": self.ddof,
            "eps": self.eps,
            "min_std": self.min_std,
            "clip": math.inf if self.clip is None else self.clip,
        }


def reference_group_advantages(
    rewards: Tensor, group_ids: Tensor | None, group_size: int, rule: AdvantageRule
) -> Tensor:
    """The readable specification: one group after the other, in fp64."""
    if group_ids is None:
        group_ids = torch.arange(len(rewards), device=rewards.device) // group_size
    exact = rewards.double()
    counted = ~exact.isnan()
    advantages = torch.zeros_like(exact)
    for group_id in group_ids.unique():
        members = counted & (group_ids == group_id)
        group = exact[members]
        n = len(group)
        if n < 2 or group.min() == group.max():
            continue  # nothing to compare with: exactly 0, whatever rounding would do to the mean
        if rule.baseline == "mean":
            advantage = group - group.mean()
        elif rule.baseline == "leave_one_out":
            advantage = group - (group.sum() - group) / (n - 1)
        else:
            advantage = group
        if rule.scale != "none":
            compared = group if rule.scale == "group" else exact[counted]
            std = compared.std(correction=rule.ddof)
            advantage = advantage / (std.clamp(min=rule.min_std) + rule.eps)
        if rule.clip is not None:
            advantage = advantage.clamp(-rule.clip, rule.clip)
        advantages[members] = advantage
    return advantages.float()


library.define(
    "group_advantages(Tensor rewards, Tensor? group_ids, int group_size, str baseline, str scale, "
    "int ddof, float eps, float min_std, float? clip, str impl) -> Tensor"
)


@torch.library.register_fake("regrpo_kernels::group_advantages", lib=library)
def _(rewards, group_ids, group_size, baseline, scale, ddof, eps, min_std, clip, impl):
    return torch.empty_like(rewards)


@torch.library.impl("regrpo_kernels::group_advantages", ("cpu", "cuda"), lib=library)
def _group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    min_std: float,
    clip: float | None,
    impl: str,
) -> Tensor:
    rule = AdvantageRule(baseline, scale, ddof, eps, min_std, clip)
    if rewards.device.type == "cpu" and rewards.isinf().any():
        index = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"rewards must not be infinite, got rewards[{index}] = {rewards[index]}")
    if impl == "reference":
        return reference_group_advantages(rewards, group_ids, group_size, rule)
    advantages = torch.empty_like(rewards)
    with device_guard(rewards):
        if impl == "triton":
            from regrpo_kernels import triton_advantages

            triton_advantages.group_advantages(rewards, group_ids, group_size, rule, advantages)
        else:
            compiled().group_advantages(
                sequences=len(rewards),
                rewards=pointer(rewards),
                group_ids=pointer(group_ids),
                group_size=group_size,
                **rule.compiled(),
                advantages=pointer(advantages),
                stream=launch(rewards)["stream"],
            )
    return advantages


def check_groups(groups: int | Tensor, rewards: Tensor) -> tuple[Tensor | None, int]:
    """`groups` as `(group_ids or None, group_size)`; the size is 0 where there are ids."""
    sequences = rewards.shape[0]
    if isinstance(groups, Tensor):
        if groups.dtype != torch.int64:
            raise TypeError(
                f"groups must be an int or ids of dtype torch.int64, got {groups.dtype}"
            )
        if groups.shape != (sequences,):
            raise ValueError(f"groups must have shape [{sequences}], got {list(groups.shape)}")
        if groups.device != rewards.device:
            raise ValueError(f"groups must be on {rewards.device}, got a tensor on {groups.device}")
        return groups.contiguous(), 0
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(
            "groups must be an int (the size of equal groups) or int64 ids, "
            f"got {type(groups).__name__}"
        )
    if groups < 1 or sequences % groups:
        raise ValueError(
            f"groups must be a group size of at least 1 that divides B = {sequences}, got {groups}"
        )
    return None, groups


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    min_std: float = 0.0,
    clip: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Advantages of B sequences within their groups; carries no gradient.

    A group of one and a group whose rewards are all equal have advantage exactly 0, whatever the
    baseline: there is nothing to compare. A NaN reward counts for nothing (not in the mean, the
    std or the size) and gets advantage 0.

    Args:
        rewards: `[B]`, floating; taken as float32. An infinite reward raises on CPU; on GPU, where
            looking at values would wait for the device, it makes the advantages of its group
            meaningless.
        groups: the size of equal groups of consecutive sequences (it divides B), or int64 ids
            `[B]`: sequences with the same id, any value, in any order, form a group.
        baseline: "mean" of the group; "leave_one_out", the mean of the others; "none", 0.
        scale: divide by the standard deviation of the "group", of the "batch" (all rewards), or
            not at all: "none", where `eps` and `min_std` have no part.
        ddof: 1 for the sample, 0 for the population standard deviation.
        eps: added to the standard deviation.
        min_std: least standard deviation to divide by, in units of reward; keeps noise small in a
            group that hardly varies.
        clip: advantages are clipped to `[-clip, clip]`; None for no clipping.
        impl: None (the best one present), "reference", "cpu", "triton" or "cuda".

    Returns:
        Advantages `[B]`, float32, on the device of the rewards.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
    """
    rule = AdvantageRule(baseline, scale, ddof, eps, min_std, clip)
    rule.check()
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [B], got {list(rewards.shape)}")
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must have a floating dtype, got {rewards.dtype}")
    group_ids, group_size = check_groups(groups, rewards)
    impl = choose_impl(impl, rewards.device)
    rewards = rewards.detach().float().contiguous()
    return torch.ops.regrpo_kernels.group_advantages(rewards, group_ids, group_size, *rule, impl)
