"""Floating-point operations of an update, by part; a multiplication and an addition are two.

Tokens ``T``, pairs of a token and one that it sees ``N`` (causal: half of ``T^2``), query heads
``A`` of width ``D``, hidden size ``H``, vocabulary ``V``, weights of matrix products ``P``::

    matrix products, forward     2 P T               (Kaplan et al. 2020, arXiv 2001.08361)
    attention, forward           4 A D N a layer     scores and weighted values
    backward, to activations     2 P T               of every weight behind the first trained one
    backward, to weights         2 P T               of trained weights only
    attention, backward          10 A D N a layer    2.5 forward: the scores once more, and four
                                                     products (Dao 2023, arXiv 2307.08691)
    head                         2 V H a trained token forward, as many back to the hidden states
                                 and as many to its weight if that is trained
    recomputation                forward once more, but for each layer's last product
                                                     (Chen et al. 2016, arXiv 1604.06174)

So under an adapter with a frozen base, backward costs a forward pass of the base, not two, and in
the first layer queries, keys and values have nothing to give a gradient to. An image's patches see
all others of it, or those of their window. What is not a matrix product (norms, activations,
rotations, softmax, the optimizer) is left out.
"""

from dataclasses import dataclass

from regrpo.modeling import decoder, head
from regrpo.plan.model import (
    CausalLM,
    RunConfig,
    head_dim,
    linear_numel,
    linears,
    text_config,
    vision_tower,
)
from regrpo.plan.work import Work


@dataclass(frozen=True)
class Products:
    """FLOPs of a part for each token, and of attention for each pair, in all of its layers.

    Attributes:
        again: of ``forward``, what checkpointing computes once more.
    """

    forward: int
    again: int
    backward: int
    pair_forward: int = 0
    pair_backward: int = 0


def text_products(model: CausalLM) -> Products:
    """Of the decoder's layers, without embedding and head."""
    layers = decoder(model).layers
    forward = backward = again = 0
    for index, layer in enumerate(layers):
        for name, linear in linears(layer):
            size, weight = linear.weight.numel(), linear.weight
            forward += 2 * size
            again += 2 * size
            backward += 2 * size * (weight.requires_grad + _input_has_gradient(model, index, name))
        again -= 2 * size  # nothing is saved of the layer's last product, which is not repeated
    heads = text_config(model).num_attention_heads * head_dim(model)
    return Products(forward, again, backward, 4 * heads * len(layers), 10 * heads * len(layers))


def _input_has_gradient(model: CausalLM, index: int, name: str) -> bool:
    """Whether what a matrix product of a decoder layer gets depends on a trained weight."""
    if index > 0 or ".lora_B" in name or not name.startswith("self_attn") or ".o_proj" in name:
        return True
    text = decoder(model)
    before = (text.embed_tokens, text.layers[0].input_layernorm)
    return any(p.requires_grad for module in before for p in module.parameters())


def head_products(model: CausalLM) -> Products:
    """Of the language-model head, for each trained token."""
    weight = head(model)[0]
    size = 2 * weight.numel()
    return Products(size, 0, size * (1 + weight.requires_grad))


def image_flops(model: CausalLM, image_tokens: int) -> int:
    """Of one image through the vision tower, forward; it is frozen."""
    tower = vision_tower(model)
    config = tower.config
    patches = image_tokens * config.spatial_merge_size**2
    embedding = patches * tower.patch_embed.proj.weight.numel()
    products = patches * linear_numel(tower.blocks) + image_tokens * linear_numel(tower.merger)
    width = tower.blocks[0].attn.proj.in_features
    pairs = sum(patches * _seen(config, index, patches) for index in range(len(tower.blocks)))
    return 2 * (embedding + products) + 4 * width * pairs


def _seen(config: object, index: int, patches: int) -> int:
    """Patches that one sees in a block: all, or its window (Qwen2.5-VL)."""
    whole = getattr(config, "fullatt_block_indexes", None)
    if whole is None or index in whole:
        return patches
    side = config.window_size // config.patch_size  # type: ignore[attr-defined]
    return min(patches, side * side)


def update_flops(run: RunConfig, model: CausalLM, work: Work) -> dict[str, float]:
    """FLOPs of one process's share of an update, by part."""
    text, out = text_products(model), head_products(model)
    images = work.groups * work.images
    pairs = work.context_pairs + work.branch_pairs
    forward = text.forward * work.tokens + text.pair_forward * pairs
    scored = forward + out.forward * work.trained
    parts: dict[str, float] = {}
    encoded = 0  # how often the vision tower runs over the contexts
    if work.samples:
        read = work.groups * work.context + work.trajectories * work.observed
        parts["rollout, prefill"] = (
            text.forward * read + text.pair_forward * work.context_pairs + out.forward * work.groups
        )
        parts["rollout, decoding"] = (
            text.forward + out.forward
        ) * work.trained + text.pair_forward * work.branch_pairs
        encoded += 1
    if work.reference:
        parts["reference log-probs"] = scored
        encoded += 1
    if work.scoring_passes:
        parts["log-probs for clip_target"] = work.epochs * work.scoring_passes * scored
        encoded += work.epochs * work.scoring_passes
    parts["forward"] = work.epochs * forward
    encoded += work.epochs
    if run.gradient_checkpointing:
        again = text.again * work.tokens + text.pair_forward * pairs
        parts["forward again (checkpointing)"] = work.epochs * again
    parts["backward"] = work.epochs * (text.backward * work.tokens + text.pair_backward * pairs)
    parts["loss head"] = work.epochs * (out.forward + out.backward) * work.trained
    if images:
        parts["vision tower"] = encoded * images * image_flops(model, work.image_tokens)
    return parts
