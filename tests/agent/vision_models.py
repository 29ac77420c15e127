"""Tiny random vision-language models of the Qwen families, their tokenizer and image processor."""

import io

import torch
from PIL import Image
from transformers import (
    AddedToken,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

MARKUP = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
HIDDEN = 48
FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")


def png(width, height, seed=0):
    """A file of random pixels."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def with_markup(tokenizer):
    """The tokenizer with the special tokens around images."""
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in MARKUP])
    return tokenizer


def image_processor():
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
    )


def vision_model(family, tokenizer, seed=0):
    """A random model of a family, whose weights are not near zero."""
    torch.manual_seed(seed)
    start, pad, end = tokenizer.convert_tokens_to_ids(list(MARKUP))
    ids = {"vision_start_token_id": start, "image_token_id": pad, "vision_end_token_id": end}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 2, 2],
        },
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    seen = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    if family == "qwen2-vl":
        vision = {**seen, "depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2}
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        )
    elif family == "qwen2.5-vl":
        vision = {
            **seen,
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": HIDDEN,
            "num_heads": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        }
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        )
    else:
        vision = {
            **seen,
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": HIDDEN,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config={**text, "head_dim": 12}, vision_config=vision, **ids)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.1)
    return model
