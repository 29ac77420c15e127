"""A small Qwen3-VL model, its tokenizer and image processor, for experiments on two CPU cores.

The vision tower sees patches of one glyph cell's width, and a token of the language side is 2 x 2
of them: ``GRID`` pixels a side, two glyphs of a page (`regrpo.vision_tasks`). Its positions are
learned, so that a token knows where on the page it lies. The tokenizer is that of the small text
model (`regrpo.small_model`): labels and coordinates are one token each, numbers that are read are
digits.
"""

import torch
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from regrpo.vision_tasks import GRID

MARKUP = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
MERGE = 2
MAX_PATCHES = 256  # as many positions as the tower learns


def add_image_markup(tokenizer: Qwen2Tokenizer) -> None:
    """Adds the special tokens around images."""
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in MARKUP])


def image_processor() -> Qwen2VLImageProcessorPil:
    """Cuts images into patches; those whose sides are multiples of ``GRID`` keep their pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=GRID // MERGE,
        merge_size=MERGE,
        temporal_patch_size=1,
        size={"shortest_edge": GRID**2, "longest_edge": 4 * MAX_PATCHES * (GRID // MERGE) ** 2},
    )


def build_vision_model(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    vision_size: int = 96,
    vision_depth: int = 1,
    seed: int = 0,
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL model with fresh weights that fits ``tokenizer`` and ``image_processor``."""
    torch.manual_seed(seed)
    vocabulary = tokenizer.get_vocab()
    start, pad, end = (vocabulary[name] for name in MARKUP)
    head_dim = hidden_size // num_heads
    time = head_dim // 8
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 1024,
        # The usual 0.02 is for widths of thousands (`regrpo.small_model`).
        "initializer_range": 0.6 * hidden_size**-0.5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [time, time, head_dim // 2 - 2 * time],
        },
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_size,
        "intermediate_size": 2 * vision_size,
        "out_hidden_size": hidden_size,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": GRID // MERGE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 1,
        "num_position_embeddings": MAX_PATCHES,
        "deepstack_visual_indexes": [],
        "initializer_range": 0.1,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        image_token_id=pad,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)
