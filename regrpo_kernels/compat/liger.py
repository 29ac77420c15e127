"""Liger's GRPO entry points (liger-kernel 0.8), on CPU as well.

Signatures, shapes, defaults and what is returned are Liger's. Values are too, except where Liger's
are not those of the objective: see `docs/compat.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from regrpo_kernels._library import IGNORE_INDEX, check_device
from regrpo_kernels.compat.inplace_log_probs import inplace_log_probs
from regrpo_kernels.compat.loss_types import (
    CLIP_TYPES,
    LossType,
    check_is_ratio,
    check_mask,
    check_shape,
    token_advantages,
)
from regrpo_kernels.grpo_loss import LossOutput, grpo_loss
from regrpo_kernels.linear_grpo_loss import linear_grpo_loss
from regrpo_kernels.linear_token_log_probs import linear_token_log_probs
from regrpo_kernels.token_log_probs import token_log_probs


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probs of the last L of `input_ids`, without a gradient.

    Args:
        logits: `[B, L + 1, V]`; the last row predicts what comes after the last token and is not
            read.
        input_ids: `[B, L]` or longer.
        temperature: logits are divided by it.
        mask: as `input_ids`; zero skips the token.

    Returns:
        fp32 `[B, L]`, zero where masked.

    Raises:
        ValueError, TypeError: as `token_log_probs`.
    """
    length = _completion_length(logits)
    ids = _last_tokens("input_ids", input_ids, logits.shape[0], length)
    kept = None if mask is None else _last_tokens("mask", mask, logits.shape[0], length)
    kept = check_mask("mask", kept, ids.shape, logits)
    labels = _labels(ids, kept)
    return token_log_probs(logits, labels, temperature=temperature).log_probs[:, :-1]


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """The GRPO loss from padded logits; see `LossType` for the loss types.

    Args:
        logits: `[B, L + 1, V]`, fp32, bf16 or fp16. After backward they hold their gradient if
            `inplace`; with `reduce`, token-level ratios and `inplace=False` they are read once
            instead of twice, at the cost of a gradient of their size.
        old_logp, ref_logp: `[B, L]`; None: a ratio of 1; no KL, which needs `beta=0`.
        completion_ids: `[B, L]`.
        advantages: `[B]`, or `[B, L]`.
        completion_mask: `[B, L]` of 0 and 1. Masked logits are never read.
        vllm_is_ratio: `[B]`, `[B, 1]` or `[B, L]`, at least 0.
        The others as in Liger; `eps_high` is the bound itself for "cispo".

    Returns:
        `(loss [B, L], kl [B, L] or None, is_clipped [B, L])`, or with `reduce`
        `(loss, [kl, clip_ratio])`, 0-d, without the kl where `beta=0`.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or option, or two that exclude each other.
    """
    spec = _loss_type(
        loss_type=loss_type,
        beta=beta,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        delta=delta,
        importance_sampling_level=importance_sampling_level,
        use_bias_correction_kl=use_bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        temperature=temperature,
        max_completion_length=max_completion_length,
    )
    shape = torch.Size((logits.shape[0], _completion_length(logits)))
    check_shape("completion_ids", completion_ids, shape, logits)
    for name, tensor in (("old_logp", old_logp), ("ref_logp", ref_logp)):
        if tensor is not None:
            check_shape(name, tensor, shape, logits)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is needed by beta={beta}, got None")
    mask = check_mask("completion_mask", completion_mask, shape, logits)
    advantages = token_advantages(advantages, shape, logits)
    is_ratio = check_is_ratio("vllm_is_ratio", vllm_is_ratio, shape, logits)
    labels = _labels(completion_ids, mask)
    if reduce and not inplace and spec.one_sweep:
        found = grpo_loss(
            logits,
            labels,
            pad(_weighted(advantages, is_ratio), (0, 1)),
            old_log_probs=None if old_logp is None else pad(old_logp, (0, 1)),
            ref_log_probs=pad(ref_logp, (0, 1)) if ref_logp is not None and beta != 0 else None,
            objective=spec.objective(),
            normalizer=spec.normalizer(mask, num_items_in_batch),
        )
        log_probs = found.log_probs[:, :-1]
        return found.loss, _metrics(spec, found, log_probs, mask, advantages, old_logp)
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        log_probs = inplace_log_probs(logits, labels, temperature)
    else:
        log_probs = token_log_probs(logits, labels, temperature=temperature).log_probs
    loss, kl, clipped = spec.token_losses(
        log_probs[:, :-1], mask, advantages, old_logp, ref_logp, is_ratio
    )
    if not reduce:
        return loss, kl, clipped
    weights = spec.weights(mask, spec.normalizer(mask, num_items_in_batch))
    return (loss * weights).sum(), _means(mask, kl, clipped)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The GRPO loss from hidden states: the logits are never held whole.

    The options are those of `triton_grpo_loss`. `compiled` and `chunk_size` change nothing in the
    result and are accepted for the signature's sake: nothing is compiled here, and chunks are of
    rows.

    Raises:
        ValueError: an option has a bad value.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        # Liger's attributes, which its users set and read
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._spec()

    def _spec(self) -> LossType:
        spec = _loss_type(
            loss_type=self.loss_type,
            # without a reference the policy is its own: a KL of 0, and no gradient
            beta=self.beta if self.use_ref_model else 0.0,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            importance_sampling_level=self.importance_sampling_level,
            use_bias_correction_kl=self.use_bias_correction_kl,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
        )
        if spec.loss_type == "dr_grpo" and spec.max_completion_length is None:
            raise ValueError("max_completion_length is needed by loss_type='dr_grpo', got None")
        return spec

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Args:
            _input: `[B, T, H]`; lin_weight `[V, H]` and bias `[V]` are cast to its dtype.
            selected_token_ids, attention_mask: `[B, T]`; 0 in the mask skips the token.
            advantages: `[B]`, or `[B, T]`.
            ref_per_token_logps: `[B, T]`; or else ref_input `[B, T, H]`, ref_weight and ref_bias.
            old_per_token_logps: `[B, T]`; None: a ratio of 1.
            vllm_is_ratio: `[B]`, `[B, 1]` or `[B, T]`, at least 0.

        Returns:
            `(loss, (kl, clip_ratio))`, 0-d, without the kl where `beta=0`.

        Raises:
            ValueError, TypeError: a bad shape, dtype, device or combination.
        """
        spec = self._spec()
        shape = selected_token_ids.shape
        if _input.dim() != 3 or _input.shape[:2] != shape:
            raise ValueError(
                f"_input must have shape [B, T, H] to match selected_token_ids {list(shape)}, "
                f"got {list(_input.shape)}"
            )
        mask = check_mask("attention_mask", attention_mask, shape, _input)
        advantages = token_advantages(advantages, shape, _input)
        is_ratio = check_is_ratio("vllm_is_ratio", vllm_is_ratio, shape, _input)
        for name, tensor in (
            ("ref_per_token_logps", ref_per_token_logps),
            ("old_per_token_logps", old_per_token_logps),
        ):
            if tensor is not None:
                check_shape(name, tensor, shape, _input)
        labels = selected_token_ids.long().masked_fill(~mask, IGNORE_INDEX)
        ref = self._ref_log_probs(labels, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        weight = lin_weight.to(_input.dtype)
        bias = None if bias is None else bias.to(_input.dtype)
        normalizer = spec.normalizer(mask, num_items_in_batch)
        if spec.one_sweep:
            found = linear_grpo_loss(
                _input,
                weight,
                labels,
                _weighted(advantages, is_ratio),
                bias=bias,
                old_log_probs=old_per_token_logps,
                ref_log_probs=ref if spec.beta != 0 else None,
                objective=spec.objective(),
                normalizer=normalizer,
            )
            loss = found.loss
            metrics = _metrics(spec, found, found.log_probs, mask, advantages, old_per_token_logps)
        else:
            log_probs = linear_token_log_probs(
                _input, weight, labels, bias=bias, temperature=self.temperature
            ).log_probs
            token = spec.token_losses(
                log_probs, mask, advantages, old_per_token_logps, ref, is_ratio
            )
            loss = (token.loss * spec.weights(mask, normalizer)).sum()
            metrics = _means(mask, token.kl, token.clipped)
        if self.beta != 0 and not self.use_ref_model:
            metrics.insert(0, loss.detach().new_zeros(()))
        return loss, tuple(metrics)

    def _ref_log_probs(
        self,
        labels: Tensor,
        ref_per_token_logps: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor | None:
        if not self.use_ref_model:
            if ref_per_token_logps is not None:
                raise ValueError("ref_per_token_logps must be None when use_ref_model=False")
            return None
        if ref_per_token_logps is not None:
            return ref_per_token_logps
        if ref_input is None or ref_weight is None:
            raise ValueError(
                "use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight"
            )
        if self.beta == 0:
            return None
        with torch.no_grad():
            return linear_token_log_probs(
                ref_input,
                ref_weight.to(ref_input.dtype),
                labels,
                bias=None if ref_bias is None else ref_bias.to(ref_input.dtype),
                temperature=self.temperature,
            ).log_probs


def _loss_type(**options: object) -> LossType:
    spec = LossType(**options)  # type: ignore[arg-type]
    if spec.loss_type not in CLIP_TYPES:
        if spec.delta is not None:
            raise ValueError(f"delta is not supported for loss_type={spec.loss_type!r}")
        if spec.importance_sampling_level == "sequence":
            raise ValueError(
                "Sequence-level importance sampling is not supported for "
                f"loss_type={spec.loss_type!r}; pass importance_sampling_level='token'"
            )
    return spec


def _completion_length(logits: Tensor) -> int:
    if logits.dim() != 3 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [B, L + 1, V], got {list(logits.shape)}")
    return logits.shape[1] - 1


def _last_tokens(name: str, tensor: Tensor, batch: int, length: int) -> Tensor:
    if tensor.dim() != 2 or tensor.shape[0] != batch or tensor.shape[1] < length:
        raise ValueError(
            f"{name} must have shape [{batch}, {length}] or be longer, got {list(tensor.shape)}"
        )
    return tensor[:, tensor.shape[1] - length :]


def _labels(ids: Tensor, mask: Tensor) -> Tensor:
    """`[B, L + 1]`: whole logits are taken as they are, and the last row is one more masked one."""
    check_device("completion_ids", ids, mask)
    return pad(ids.long().masked_fill(~mask, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)


def _weighted(advantages: Tensor, is_ratio: Tensor | None) -> Tensor:
    """Every policy is linear in the size of the advantage."""
    return advantages if is_ratio is None else advantages * is_ratio


def _metrics(
    spec: LossType,
    found: LossOutput,
    log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old: Tensor | None,
) -> list[Tensor]:
    """Of a loss in one sweep; not its own metrics, as the sampler's correction is in its
    advantages.
    """
    old = None if old is None else old.float().masked_fill(~mask, 0.0)
    clipped = spec.clipped(spec.log_ratios(log_probs, old, mask), advantages)
    kl = None if found.kl is None else found.kl[:, : mask.shape[1]]
    return _means(mask, kl, clipped)


def _means(mask: Tensor, kl: Tensor | None, clipped: Tensor) -> list[Tensor]:
    tokens = mask.sum().clamp(min=1)
    return [x.masked_fill(~mask, 0.0).sum() / tokens for x in (kl, clipped) if x is not None]
