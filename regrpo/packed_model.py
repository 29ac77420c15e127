"""A model over packed batches, in the dtype, the memory and the processes that a run is given.

- ``dtype``: in bfloat16 the forward pass runs under autocast. What is trained stays in float32
  (weights, gradients, optimizer), because a bfloat16 weight loses updates smaller than 1/256 of it;
  what is frozen, a base under an adapter, is kept in bfloat16.
- ``gradient_checkpointing``: layers are computed again in backward (Chen et al. 2016,
  arXiv 1604.06174), by transformers' own checkpointing.
- ``fsdp``: the weights are sharded; this module is what FSDP sees as the model (``sharding.py``).
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from regrpo.config import SFTConfig, TrainConfig
from regrpo.distributed import ALONE, Ranks
from regrpo.modeling import (
    PACKED,
    CausalLM,
    attention,
    base_model,
    decoder,
    head,
    hidden_states,
    load_model,
)
from regrpo.packing import PackedBatch, blank
from regrpo.sharding import gathered, is_sharded, release, shard

Context = contextlib.AbstractContextManager[None]


class PackedModel(torch.nn.Module):
    """A causal language model as ``regrpo.losses`` needs it: hidden states and the head.

    Args:
        model: trained parameters in float32 if ``dtype`` is given.
        dtype: of the computation; None for the model's own, without autocast.
        gradient_checkpointing: compute layers again in backward.

    Raises:
        NotImplementedError: the model has no layers that can be computed again.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.recomputed: list[GradientCheckpointingLayer] = []
        if gradient_checkpointing:
            self.recomputed = _layers_to_recompute(model)

    def _autocast(self) -> Context:
        if self.dtype is None:
            return contextlib.nullcontext()
        device = base_model(self.model).device.type
        return torch.autocast(device, self.dtype)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states of ``regrpo.modeling.hidden_states``, in the dtype of the head."""
        if torch.is_grad_enabled():
            # transformers recomputes layers in training mode only. The mode of a layer alone says
            # nothing to the modules in it, so their dropout is what the model's mode makes it.
            for layer in self.recomputed:
                layer.training = True
        with self._autocast():
            hidden = hidden_states(self.model, batch)
        if is_sharded(self):
            hidden = hidden.clone()  # FSDP hooks what it returns, which may be no view
        return hidden if self.dtype is None else hidden.to(self.dtype)

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, H] and bias [V], in the dtype of the hidden states; behind ``forward``, where
        the weights are sharded."""
        weight, bias = head(self.model)
        if self.dtype is None:
            return weight, bias
        return weight.to(self.dtype), None if bias is None else bias.to(self.dtype)

    def equal_passes(self, packs: list[PackedBatch], ranks: Ranks) -> list[PackedBatch]:
        """The packs, with blank ones behind them where another process has more and every pass is a
        collective."""
        if not is_sharded(self):
            return packs
        lacking = max(ranks.gather(len(packs))) - len(packs)
        return packs + [blank().to(base_model(self.model).device)] * lacking

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """A block that samples from the model: whole weights, cast once."""
        with gathered(self), self._autocast():
            yield


def _layers_to_recompute(model: CausalLM) -> list[GradientCheckpointingLayer]:
    layers = [m for m in decoder(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    name = type(base_model(model)).__name__
    if not layers:
        raise NotImplementedError(
            f"{name} has no layers that transformers can recompute; "
            "expected some with gradient_checkpointing"
        )

    def contexts() -> tuple[Context, Context]:
        # By the time of backward the model has its own attention again.
        return contextlib.nullcontext(), attention(model, PACKED)

    recomputing = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for layer in layers:
        dropout = [
            key
            for key, value in vars(layer).items()
            if "dropout" in key and isinstance(value, float) and value > 0
        ]
        if dropout:
            raise NotImplementedError(
                f"{type(layer).__name__} applies {', '.join(dropout)} itself; "
                "expected no dropout of the layer's own with gradient_checkpointing"
            )
        layer.gradient_checkpointing = True
        layer.__dict__["_gradient_checkpointing_func"] = recomputing
    return layers


def load_packed(config: SFTConfig | TrainConfig, ranks: Ranks = ALONE) -> PackedModel:
    """Loads the model of a run, with a new adapter if it asks for one.

    Raises:
        ValueError: ``dtype`` is "auto" and the model is saved in neither float32 nor bfloat16.
        RunError: the processes have different weights.
    """
    lora = config.lora
    adapted = lora.rank > 0 or (Path(config.model) / "adapter_config.json").exists()
    # Trained weights are not rounded on their way to float32.
    whole = config.dtype == "bfloat16" and not adapted
    model = load_model(
        config.model,
        dtype="float32" if whole else config.dtype,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        lora_targets=lora.targets,
    )
    saved = base_model(model).dtype
    if saved not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"dtype: got 'auto', and {config.model} is saved in {saved}; "
            "expected float32 or bfloat16"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    low = config.dtype == "bfloat16" or saved == torch.bfloat16
    packed = PackedModel(
        model,
        dtype=torch.bfloat16 if low else None,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if ranks.size > 1:
        total = sum(p.detach().double().sum().item() for p in model.parameters())
        ranks.require_same(total, "the sum of the weights")
        if config.parallel == "fsdp":
            shard(packed, decoder(model), packed.dtype)
            with torch.no_grad():  # FSDP takes the module that is called first for the root
                packed(blank().to(base_model(model).device))
            release(packed)
    return packed
