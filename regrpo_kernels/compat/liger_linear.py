"""Liger's GRPO loss from hidden states, as a module."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from regrpo_kernels._library import IGNORE_INDEX
from regrpo_kernels.compat.liger_shared import (
    check_combination,
    means,
    one_sweep_metrics,
    weighted,
)
from regrpo_kernels.compat.loss_types import (
    LossType,
    check_is_ratio,
    check_mask,
    check_shape,
    token_advantages,
)
from regrpo_kernels.linear_grpo_loss import linear_grpo_loss
from regrpo_kernels.linear_token_log_probs import linear_token_log_probs


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
        self._spec()  # bad values are found here, those that exclude each other in forward

    def _spec(self) -> LossType:
        return LossType(
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
        """The loss of a batch.

        Args:
            _input: `[B, T, H]`, fp32, bf16 or fp16.
            lin_weight, bias: the head, `[V, H]` and `[V]`; cast to the dtype of `_input`.
            selected_token_ids, attention_mask: `[B, T]`; 0 in the mask skips the token.
            advantages: `[B]`, or `[B, T]`.
            ref_per_token_logps: `[B, T]`, for the KL.
            ref_input, ref_weight, ref_bias: what they are made of where they are not given; shaped
                like `_input`, `lin_weight` and `bias`.
            old_per_token_logps: `[B, T]`; None: a ratio of 1.
            vllm_is_ratio: factors of the losses, `[B]`, `[B, 1]` or `[B, T]`, at least 0.
            num_items_in_batch: as in `triton_grpo_loss`.

        Returns:
            `(loss, (kl, clip_ratio))`, 0-d, without the kl where `beta=0`.

        Raises:
            ValueError, TypeError: a bad shape, dtype, device or combination.
        """
        spec = self._spec()
        check_combination(spec)
        if spec.loss_type == "dr_grpo" and spec.max_completion_length is None:
            raise ValueError("max_completion_length is needed by loss_type='dr_grpo', got None")
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
                weighted(advantages, is_ratio),
                bias=bias,
                old_log_probs=old_per_token_logps,
                ref_log_probs=ref if spec.beta != 0 else None,
                objective=spec.objective(),
                normalizer=normalizer,
            )
            loss = found.loss
            metrics = one_sweep_metrics(
                spec, found, found.log_probs, mask, advantages, old_per_token_logps
            )
        else:
            log_probs = linear_token_log_probs(
                _input, weight, labels, bias=bias, temperature=self.temperature
            ).log_probs
            token = spec.token_losses(
                log_probs, mask, advantages, old_per_token_logps, ref, is_ratio
            )
            loss = (token.loss * spec.weights(mask, normalizer)).sum()
            metrics = means(mask, token.kl, token.clipped)
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
            if ref_input is not None:
                warnings.warn(
                    "Both ref_per_token_logps and ref_input are provided. Using "
                    "ref_per_token_logps.",
                    stacklevel=3,
                )
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
