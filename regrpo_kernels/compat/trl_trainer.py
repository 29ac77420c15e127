"""A stock TRL `GRPOTrainer` on our kernels.

TRL gives its model a forward that returns log-probs instead of logits. It gets another one here.
Where the gradient of a token is known as soon as its log-prob is, forward computes the whole loss
(`linear_grpo_loss`), and TRL's own code turns the log-probs into its metrics. Elsewhere TRL's own
code makes a loss of our differentiable log-probs. TRL's metrics are TRL's either way.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regrpo_kernels._library import IGNORE_INDEX
from regrpo_kernels.compat.loss_types import LossType, token_advantages
from regrpo_kernels.compat.scaled_head import ScaledHead, logit_scale_of


@dataclass(frozen=True)
class LossRequest:
    """The arguments of the loss, for a forward that computes it; tensors are `[B, L]`."""

    spec: LossType
    advantages: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    mask: Tensor
    normalizer: Tensor | float


def patch_grpo_trainer(trainer: Any) -> Any:
    """Puts the loss and the log-probs of a stock `GRPOTrainer` on our kernels, and returns it.

    Every loss type, option and metric stays as it is, to rounding; so do log-probs of the old and
    the reference policy. `docs/compat.md` says which options take the one-sweep path. Call it once,
    before `train()`.

    Raises:
        ValueError: the trainer uses what is not supported: a router loss (mixture of experts),
            DeepSpeed ZeRO-3, or a `_compute_loss` of a subclass.
        TypeError: it is no `GRPOTrainer`.
    """
    from trl import GRPOTrainer

    if not issubclass(type(trainer), GRPOTrainer):
        raise TypeError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}")
    if "_compute_loss" in vars(trainer):
        raise ValueError("trainer is patched already")
    if type(trainer)._compute_loss is not GRPOTrainer._compute_loss:
        raise ValueError(f"trainer: {type(trainer).__name__} has a _compute_loss of its own")
    if trainer.aux_loss_enabled:
        raise ValueError(
            "router_aux_loss_coef is not supported: set it to 0, or leave the trainer unpatched"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    models = [model.get_base_model() if hasattr(model, "get_base_model") else model]
    if trainer.ref_model is not None:
        models.append(trainer.accelerator.unwrap_model(trainer.ref_model))
    heads = []
    for each in models:  # all checks before the first change
        if not hasattr(each.get_output_embeddings(), "weight"):
            raise ValueError(f"{type(each).__name__} has no output embeddings with a weight")
        if hasattr(each.get_output_embeddings().weight, "ds_id"):
            raise ValueError("DeepSpeed ZeRO-3 is not supported: the head's weight is partitioned")
        config = each.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        scale, fp32 = logit_scale_of(config), trainer.args.cast_lm_head_to_fp32
        heads.append(ScaledHead(trainer.temperature, softcap, scale, fp32))
    for each, head in zip(models, heads, strict=True):
        entropy = each is models[0]  # of the reference nobody asks it
        forward = _fused_forward(each.forward, type(each), head, entropy)
        each.forward = types.MethodType(forward, each)
    trainer._compute_loss = types.MethodType(_compute_loss, trainer)
    return trainer


def _compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    stock = type(trainer)._compute_loss
    spec = LossType(
        loss_type=trainer.loss_type,
        beta=trainer.beta,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=trainer.args.delta if trainer.loss_type not in ("cispo", "sapo", "vespo") else None,
        importance_sampling_level=trainer.importance_sampling_level,
        use_bias_correction_kl=trainer.args.use_bias_correction_kl,
        sapo_temperature_pos=trainer.args.sapo_temperature_pos,
        sapo_temperature_neg=trainer.args.sapo_temperature_neg,
        temperature=trainer.temperature,
        max_completion_length=trainer.max_completion_length,
    )
    needs_log_probs_first = (
        not spec.one_sweep
        or trainer.off_policy_mask_threshold is not None
        or trainer.top_entropy_quantile < 1.0
        or trainer._entropy_bonus_enabled
    )
    if needs_log_probs_first:
        return stock(trainer, model, inputs)
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    advantages = token_advantages(inputs["advantages"], mask.shape, mask)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        advantages = advantages * inputs["importance_sampling_ratio"]
    training = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type in ("dapo", "cispo"):
        # of the generation batch; in training, of one accumulation window of it
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        share = accumulation / trainer.args.steps_per_generation if training else 1.0
        normalizer = items * share
    else:
        normalizer = spec.normalizer(mask != 0, None) * accumulation
    scoring = _LossInForward(
        model,
        LossRequest(
            spec,
            advantages,
            inputs.get("old_per_token_logps"),
            inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
            mask != 0,
            normalizer,
        ),
    )
    stock(trainer, scoring, inputs)  # the metrics, from log-probs without a gradient
    return scoring.loss


class _LossInForward:
    """A model that is asked for the loss along with the log-probs, and keeps it."""

    def __init__(self, model: Any, request: LossRequest):
        self.model, self.request = model, request

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs, loss_request=self.request)
        self.loss = outputs.loss
        return outputs


def _fused_forward(
    trl_forward: Callable[..., Any], kind: type, head: ScaledHead, entropy: bool
) -> Any:
    from torch.distributed.tensor import DTensor
    from trl.trainer.utils import FusedCausalLMOutput

    # the signature of the model's own forward: generate() validates its arguments against it
    @functools.wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        loss_request: LossRequest | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return trl_forward(*args, **kwargs)
        if labels is None:
            raise ValueError("labels are needed by fused_lm_head=True, got None")
        for name in ("shift_labels", "num_items_in_batch", "output_router_logits"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name} is not supported by regrpo_kernels.compat.trl")
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        out = self.get_output_embeddings()
        hidden, labels = hidden[:, :-1].to(out.weight.device), labels[:, 1:].to(out.weight.device)
        weight, bias = out.weight, out.bias
        if isinstance(weight, DTensor):  # FSDP2
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        if loss_request is not None:
            length = loss_request.mask.shape[1]
            found = head.loss(
                hidden[:, -length:],
                weight,
                bias,
                labels[:, -length:],
                loss_request.advantages,
                loss_request.spec.objective(),
                old_log_probs=loss_request.old_log_probs,
                ref_log_probs=loss_request.ref_log_probs,
                loss_mask=loss_request.mask,
                normalizer=loss_request.normalizer,
            )
            return FusedCausalLMOutput(
                loss=found.loss, log_probs=found.log_probs, entropy=found.entropy
            )
        rows = head.log_probs(hidden, weight, bias, labels, entropy)
        return FusedCausalLMOutput(
            log_probs=rows.log_probs, entropy=rows.entropy, label_mask=labels != IGNORE_INDEX
        )

    return forward
