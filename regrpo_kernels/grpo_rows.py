"""The kernels behind `grpo_loss` over rows of logits, for every implementation but the reference.

Token-level ratios take one sweep: a row's gradient is known as soon as its log-prob is.
Sequence-level ratios need all log-probs of a sequence first, so they take two: log-probs, then each
token's objective with its sequence's ratio, then the gradient from the sums of the log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import (
    DTYPE_CODES,
    IGNORE_INDEX,
    compiled,
    device_guard,
    launch,
    pointer,
    rows,
)
from regrpo_kernels.loss_inputs import TokenInputs
from regrpo_kernels.objective import KL_ESTIMATORS, POLICIES, Objective
from regrpo_kernels.token_log_probs import forward_rows, gradient_rows

# Rows of the statistics that every kernel fills: GrpoStat in csrc/ops.h. `dlog_prob` is the
# gradient of the whole loss, the token's weight included.
STATS = ("loss", "log_prob", "lse", "entropy", "kl", "ratio", "clip_low", "clip_high", "dlog_prob")
_LOG_PROB, _LSE, _ENTROPY, _DLOG_PROB = (
    STATS.index(name) for name in ("log_prob", "lse", "entropy", "dlog_prob")
)
# Behind them, between the phases of sequence-level ratios: `row_sums` of token_log_probs.
_ROW_SUMS = slice(len(STATS), len(STATS) + 2)

_OBJECTIVE_OPTIONS = (
    "epsilon_low",
    "epsilon_high",
    "delta",
    "beta",
    "entropy_coef",
    "sapo_tau_pos",
    "sapo_tau_neg",
)
_OPTIONS = (*_OBJECTIVE_OPTIONS, "temperature", "softcap")

# `RowInputs` in the schema of an op
ROW_INPUTS = (
    "Tensor labels, Tensor mask, Tensor weights, Tensor? advantages, Tensor? old_log_probs, "
    "Tensor? ref_log_probs, Tensor? ratio_bounds, str policy, str kl_estimator, float[] options"
)


class RowInputs(NamedTuple):
    """What the kernels take beside the logits: one value a row, contiguous, and the objective."""

    labels: Tensor
    mask: Tensor
    weights: Tensor
    advantages: Tensor | None
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    ratio_bounds: Tensor | None  # int64 [B + 1] over the flattened rows: sequence-level ratios
    policy: str
    kl_estimator: str
    options: list[float]

    @classmethod
    def of(cls, labels: Tensor, tokens: TokenInputs, objective: Objective) -> RowInputs:
        advantages, old, ref = (
            None if x is None else x.detach().float().contiguous()
            for x in (tokens.advantages, tokens.old_log_probs, tokens.ref_log_probs)
        )
        return cls(
            labels.contiguous(),
            tokens.mask.contiguous(),
            tokens.weights.float().contiguous(),
            advantages,
            old,
            ref,
            tokens.ratio_bounds,
            objective.policy,
            objective.kl_estimator,
            [float(getattr(objective, name) or 0.0) for name in _OPTIONS],
        )

    def select(self, selected: Tensor) -> RowInputs:
        """Some of the rows, in order; int64 indices into the flattened ones."""
        bounds = self.ratio_bounds
        return self._map(
            lambda x: x.flatten().index_select(0, selected),
            None if bounds is None else torch.searchsorted(selected, bounds),
        )

    def part(self, rows: slice) -> RowInputs:
        """A run of rows, without their sequences."""
        return self._map(lambda x: x[rows], None)

    def _map(self, take: Callable[[Tensor], Tensor], bounds: Tensor | None) -> RowInputs:
        return self._replace(
            labels=take(self.labels),
            mask=take(self.mask),
            weights=take(self.weights),
            advantages=None if self.advantages is None else take(self.advantages),
            old_log_probs=None if self.old_log_probs is None else take(self.old_log_probs),
            ref_log_probs=None if self.ref_log_probs is None else take(self.ref_log_probs),
            ratio_bounds=bounds,
        )

    def option(self, name: str) -> float:
        return self.options[_OPTIONS.index(name)]


def grpo_rows(logits: Tensor, dlogits: Tensor | None, inputs: RowInputs, impl: str) -> Tensor:
    """The statistics; the gradient goes to `dlogits`, which may be `logits`, if any."""
    stats = empty_stats(inputs)
    if inputs.ratio_bounds is None:
        _sweep(logits, dlogits, inputs, stats, impl)
    else:
        log_prob_rows(logits, inputs, stats, impl)
        sequence_objective(inputs, stats, impl)
        if dlogits is not None:
            objective_gradient_rows(logits, dlogits, inputs, stats, impl)
    return stats[: len(STATS)]


def empty_stats(inputs: RowInputs) -> Tensor:
    """Room for the statistics, and behind them for what the phases need."""
    shape = (_ROW_SUMS.stop, *inputs.labels.shape)
    return torch.empty(shape, dtype=torch.float32, device=inputs.labels.device)


def total_loss(stats: Tensor, weights: Tensor) -> Tensor:
    return torch.dot(stats[0].flatten(), weights.flatten())


def _sweep(
    logits: Tensor, dlogits: Tensor | None, inputs: RowInputs, stats: Tensor, impl: str
) -> None:
    labels, *tokens = inputs[:6]
    with device_guard(logits):
        if impl == "triton":
            from regrpo_kernels import triton_grpo_loss

            triton_grpo_loss.grpo_loss(
                logits, dlogits, labels, stats, *tokens, *inputs[7:9], _named(inputs)
            )
            return
        compiled().grpo_loss(
            dtype=DTYPE_CODES[logits.dtype],
            logits=rows(logits),
            rows=labels.numel(),
            vocab=logits.shape[-1],
            labels=pointer(labels),
            tokens=tuple(map(pointer, tokens)),
            objective=_objective(inputs),
            temperature=inputs.option("temperature"),
            softcap=inputs.option("softcap"),
            stats=pointer(stats),
            dlogits=None if dlogits is None else rows(dlogits),
            **launch(logits),
        )


# --- the phases of sequence-level ratios ----------------------------------------------------------


def log_prob_rows(logits: Tensor, inputs: RowInputs, stats: Tensor, impl: str) -> None:
    """Fills log_prob, lse and entropy of the trained rows, zero elsewhere."""
    forward_rows(
        logits,
        _trained_labels(inputs),
        stats[_LOG_PROB],
        stats[_LSE],
        stats[_ENTROPY],
        stats[_ROW_SUMS],
        inputs.option("temperature"),
        inputs.option("softcap"),
        impl,
    )


def sequence_objective(inputs: RowInputs, stats: Tensor, impl: str) -> None:
    """Fills the other statistics from log_prob and entropy."""
    bounds = inputs.ratio_bounds
    assert bounds is not None
    with device_guard(stats):
        if impl == "triton":
            from regrpo_kernels import triton_objective

            triton_objective.sequence_objective(
                bounds, stats, *inputs[1:6], *inputs[7:9], _named(inputs)
            )
            return
        compiled().sequence_objective(
            rows=inputs.mask.numel(),
            sequences=len(bounds) - 1,
            cu_seqlens=pointer(bounds),
            tokens=tuple(map(pointer, inputs[1:6])),
            objective=_objective(inputs),
            stats=pointer(stats),
            stream=launch(stats)["stream"],
        )


def objective_gradient_rows(
    logits: Tensor, dlogits: Tensor, inputs: RowInputs, stats: Tensor, impl: str
) -> None:
    """The gradient of the loss from the statistics; rows without one are not read."""
    entropy_coef = inputs.option("entropy_coef")
    gradient_rows(
        logits,
        _trained_labels(inputs),
        stats[_ROW_SUMS],
        stats[_ENTROPY],
        stats[_DLOG_PROB],
        -entropy_coef * inputs.weights if entropy_coef else None,
        dlogits,
        inputs.option("temperature"),
        inputs.option("softcap"),
        impl,
    )


def has_gradient(inputs: RowInputs, stats: Tensor) -> Tensor:
    """Which rows have any, bool."""
    some = stats[_DLOG_PROB] != 0
    if inputs.option("entropy_coef"):
        some = some | (inputs.weights != 0)
    return some


def _trained_labels(inputs: RowInputs) -> Tensor:
    return inputs.labels.masked_fill(~inputs.mask, IGNORE_INDEX)


def _objective(inputs: RowInputs) -> tuple[float, ...]:
    """ObjectiveParams in csrc/ops.h."""
    return (
        POLICIES.index(inputs.policy),
        KL_ESTIMATORS.index(inputs.kl_estimator),
        *inputs.options[: len(_OBJECTIVE_OPTIONS)],
    )


def _named(inputs: RowInputs) -> dict[str, float]:
    return dict(zip(_OPTIONS, inputs.options, strict=True))
