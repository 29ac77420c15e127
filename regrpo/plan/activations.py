"""What a pass keeps for its backward pass, and what sampling holds, in bytes.

As in Korthikanti et al. 2022 (arXiv 2205.05198), but counted for the layers that regrpo trains: no
dropout, attention that saves its log-sum-exps and no scores (Dao et al. 2022, arXiv 2205.14135),
norms that save their input in float32, and inputs of products only where a weight's gradient needs
them. For each token a decoder layer saves, with hidden size ``H``, queries ``Q`` and keys ``K``
wide, ``A`` heads, an intermediate size ``M``, ``c`` bytes an element of the computation and ``r``
of the residual stream::

    a norm                 4 H, and r H if its weight is trained
    inputs of q, k, v      c H for each trained or adapted one; without autocast they share it
    attention              c (2 Q + 2 K) + 4 A
    input of o             c Q if it is adapted under autocast; otherwise it is attention's output
    inputs of gate and up  as those of q, k, v
    the gated activation   3 c M
    input of down          c M if it is trained or adapted
    an adapter             c rank
"""

from typing import Any

from torch import nn

from regrpo.modeling import decoder
from regrpo.plan.model import (
    ATTENTION,
    GATED,
    CausalLM,
    Precision,
    head_dim,
    key_heads,
    linears,
    text_config,
    vision_tower,
)


def layer_activations(model: CausalLM, precision: Precision) -> int:
    """Bytes that a decoder layer saves for each token."""
    layer = decoder(model).layers[-1]
    config, compute = text_config(model), precision.compute
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_dim(model)
    keys = key_heads(model) * head_dim(model)
    needed = {name: _needs_input(layer, name) for name in (*ATTENTION, *GATED)}
    shared = compute == 4  # autocast makes every product a copy of its own

    def inputs(*names: str) -> int:
        count = sum(needed[name] for name in names)
        return compute * hidden * (min(count, 1) if shared else count)

    total = sum(_norm_activations(norm, precision) for norm in _norms(layer))
    total += inputs("q_proj", "k_proj", "v_proj") + inputs("gate_proj", "up_proj")
    total += compute * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
    if needed["o_proj"] and not shared and _is_adapted(layer, "o_proj"):
        total += compute * queries
    total += compute * inner * (3 + needed["down_proj"])
    ranks = (m.out_features for name, m in linears(layer) if ".lora_A" in name)
    return total + compute * sum(ranks)


def _is_adapted(layer: Any, name: str) -> bool:
    return any(f"{name}.lora_A" in found for found, _ in linears(layer))


def _needs_input(layer: Any, name: str) -> bool:
    """Whether a projection's input is saved for the gradient of a weight."""
    base = next(m for n, m in linears(layer) if n.removesuffix(".base_layer").endswith(name))
    return base.weight.requires_grad or _is_adapted(layer, name)


def _norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if type(m).__name__.endswith("RMSNorm")]


def _norm_activations(norm: nn.Module, precision: Precision) -> int:
    weight = norm.get_parameter("weight")
    return weight.numel() * (4 + precision.residual * weight.requires_grad)


def kept_activations(model: CausalLM, precision: Precision, *, recomputed: bool) -> int:
    """Bytes that the layers keep for each token until backward, or their inputs alone."""
    layers = len(decoder(model).layers)
    if recomputed:
        return layers * precision.residual * text_config(model).hidden_size
    return layers * layer_activations(model, precision)


def last_activations(model: CausalLM, precision: Precision) -> int:
    """Bytes for each token of the last norm and of the hidden states behind it."""
    hidden = precision.compute * text_config(model).hidden_size
    cast = precision.compute < precision.residual
    return _norm_activations(decoder(model).norm, precision) + hidden * (1 + cast)


def in_flight(model: CausalLM, precision: Precision) -> int:
    """Bytes for each token of gradients that are alive together inside a layer: of the residual
    stream, of the gated activation's product, for which that makes room, and of its factors."""
    config = text_config(model)
    gated = 3 - _needs_input(decoder(model).layers[-1], "down_proj")
    return (
        precision.residual * config.hidden_size
        + gated * precision.compute * config.intermediate_size
    )


def key_value_bytes(model: CausalLM, precision: Precision) -> int:
    """Bytes that the sampler keeps for each token.

    Rotations are in the dtype of the residual stream, and keys with them; values are a product.
    """
    width = key_heads(model) * head_dim(model)
    keys = max(precision.compute, precision.residual)
    return len(decoder(model).layers) * width * (keys + precision.compute)


def prefill_bytes(model: CausalLM, precision: Precision) -> int:
    """Bytes for each token of contexts, read all together: the gated activation of one layer."""
    config = text_config(model)
    gated = 3 * precision.compute * config.intermediate_size
    return gated + 2 * precision.residual * config.hidden_size


def image_bytes(model: CausalLM, precision: Precision, image_tokens: int) -> int:
    """Bytes that an image takes in the vision tower, which saves nothing: its pixels in float32,
    and for each patch the stream, its sum, its norm and the MLP's activation in one block."""
    tower = vision_tower(model)
    width = tower.blocks[0].attn.proj.in_features
    inner = max(m.out_features for name, m in linears(tower.blocks[0]) if "mlp" in name)
    patches = image_tokens * tower.config.spatial_merge_size**2
    pixels = 4 * tower.patch_embed.proj.weight[0].numel()
    return patches * (pixels + precision.compute * (3 * width + 3 * inner))
