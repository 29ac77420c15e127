"""verl's policy losses and log-prob function: `register()`, and then

    actor_rollout_ref.actor.policy_loss.loss_mode=regrpo     # or regrpo_gspo, _sapo, _cispo

The signature, the `loss_agg_mode`s, the options of verl's actor configuration and the names of the
metrics are verl's (0.9); the losses are `Objective`'s, so that a ratio's logarithm is clamped to
+-20 in all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regrpo_kernels.compat.loss_types import check_mask, check_shape
from regrpo_kernels.loss_inputs import loss_weights
from regrpo_kernels.objective import (
    MAX_LOG_RATIO,
    Objective,
    token_log_ratios,
    token_objective,
    with_gradient_of_log_prob,
)
from regrpo_kernels.token_log_probs import token_log_probs

AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
POLICY_LOSSES = {
    "regrpo": "clip",
    "regrpo_gspo": "gspo",
    "regrpo_sapo": "sapo",
    "regrpo_cispo": "cispo",
}


def register(log_probs: bool = True) -> tuple[str, ...]:
    """Adds the `POLICY_LOSSES` to verl's registry, and returns their names.

    Args:
        log_probs: also put `logprobs_from_logits` in the place of verl's, in verl's own module and
            in those that have imported it.

    Raises:
        ValueError: verl has a policy loss of that name already.
    """
    from verl.trainer.ppo import core_algos

    for name in POLICY_LOSSES:
        if name in core_algos.POLICY_LOSS_REGISTRY:
            raise ValueError(f"verl has a policy loss {name!r} already")
    for name, policy in POLICY_LOSSES.items():
        core_algos.register_policy_loss(name)(policy_loss_fn(policy))
    if log_probs:
        import verl.utils.torch_functional as functional

        theirs = functional.logprobs_from_logits
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "verl" and (
                getattr(module, "logprobs_from_logits", None) is theirs
            ):
                module.logprobs_from_logits = logprobs_from_logits  # type: ignore[attr-defined]
    return tuple(POLICY_LOSSES)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of labels `[...]` under logits `[..., V]`, differentiable, fp32.

    `inplace_backward` is verl's permission to write the gradient over the logits. It is not taken:
    verl reads the logits again, for the entropy.

    Raises:
        ValueError, TypeError: as `token_log_probs`.
    """
    shape = labels.shape
    if logits.dim() not in (2, 3):
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return token_log_probs(logits, labels.long()).log_probs.view(shape)


def policy_loss_fn(policy: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The function that verl calls: `policy_loss` for "clip", "gspo", "sapo" or "cispo"."""
    return partial(policy_loss, policy)


def policy_loss(
    policy: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str | None = None,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A policy loss with verl's signature.

    Args:
        old_log_prob, log_prob, advantages: `[B, L]`, a float dtype; masked entries may hold
            anything.
        response_mask: `[B, L]` of 0 and 1, or bool.
        loss_agg_mode: one of `AGG_MODES`; None for "seq-mean-token-mean" with "gspo" and
            "token-mean" with the others, as in verl. "sapo" is always "seq-mean-token-mean".
        config: verl's `ActorConfig`: `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`,
            `clip_ratio_c` ("clip"), `tau_pos` and `tau_neg` ("sapo"), and `global_batch_info`.
        rollout_is_weights: `[B, L]`, factors of the tokens' losses.

    Returns:
        `(loss, metrics)`; the metrics are numbers, as verl's are.

    Raises:
        ValueError: a bad shape, mode or option.
    """
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    shape = log_prob.shape
    mask = check_mask("response_mask", response_mask, shape, log_prob)
    inputs = {"old_log_prob": old_log_prob, "advantages": advantages}
    if rollout_is_weights is not None:
        inputs["rollout_is_weights"] = rollout_is_weights
    for name, tensor in inputs.items():
        check_shape(name, tensor, shape, log_prob)
    new, old, a = (x.float().masked_fill(~mask, 0.0) for x in (log_prob, old_log_prob, advantages))
    objective = _objective(policy, config)
    log_ratios = token_log_ratios(new, old)
    if policy == "gspo":
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = (new - old).sum(-1, keepdim=True) / count
        mean = mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(new)
        log_ratios = with_gradient_of_log_prob(mean, new)
    token = token_objective(new, log_ratios, None, a, objective)
    loss = token.loss.masked_fill(~mask, 0.0)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights.float().masked_fill(~mask, 0.0)
    mode = loss_agg_mode
    if policy == "sapo" or (policy == "gspo" and mode is None):
        mode = "seq-mean-token-mean"
    elif mode is None:
        mode = "token-mean"
    loss = (loss * _weights(mask, mode, config.global_batch_info)).sum()

    def mean_of(values: Tensor) -> float:
        return (values.float() * mask).sum().div(mask.sum().clamp(min=1)).item()

    clipped, beyond = torch.zeros_like(a), torch.zeros_like(a)
    if policy in ("clip", "gspo"):
        clipped = token.clip_low + token.clip_high
    if objective.delta is not None:
        beyond = (a < 0) & (token.ratio > objective.delta)
    if policy == "cispo":
        low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
        clipped = (token.ratio < low) | (token.ratio > high)
    return loss, {
        "actor/pg_clipfrac": mean_of(clipped),
        "actor/ppo_kl": mean_of(-token_log_ratios(new, old).detach()),
        "actor/pg_clipfrac_lower": mean_of(beyond),
    }


def _objective(policy: str, config: Any) -> Objective:
    if policy == "sapo":
        return Objective(policy="sapo", sapo_tau_pos=config.tau_pos, sapo_tau_neg=config.tau_neg)
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    delta = None
    if policy == "clip":
        # with the bound of negative advantages beyond the interval, it is that of both
        delta = config.get("clip_ratio_c", 3.0)
        if not delta >= 1 + high:
            raise ValueError(
                f"clip_ratio_c must be at least 1 + clip_ratio_high = {1 + high}, got {delta}"
            )
    return Objective(
        policy="cispo" if policy == "cispo" else "clip",
        epsilon_low=low,
        epsilon_high=high,
        delta=delta,
    )


def _weights(mask: Tensor, mode: str, batch: dict[str, Any]) -> Tensor:
    """`w` with `loss = sum(w * token losses)`; the losses of `dp_size` ranks are averaged."""
    if mode not in AGG_MODES:
        raise ValueError(f"loss_agg_mode must be one of {AGG_MODES}, got {mode!r}")
    known = ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")
    for name in batch:
        if name not in known:
            raise ValueError(f"global_batch_info: {name!r} is not supported, only {known}")
    ranks = batch.get("dp_size") or 1
    if mode == "token-sum":
        return mask.float() * ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    total = batch.get(name)
    if total is None and ranks > 1:
        raise ValueError(f"global_batch_info: {name} is needed by dp_size={ranks}, got None")
    objective = Objective(
        loss_agg_mode=mode,
        max_completion_length=batch.get("loss_scale_factor") or max(mask.shape[-1], 1),
    )
    return loss_weights(mask, objective, None, None, None if total is None else total / ranks)
