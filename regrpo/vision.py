"""Vision-language models of the Qwen-VL family: the language side is trained, the tower is not.

Images come in through the model's own vision tower, under its own attention and without gradients.
What it makes of them goes to the model as precomputed outputs, so that images computed once serve
all sequences and branches that show them. Works for models that transformers runs with multimodal
rotary positions (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from regrpo.images import ImageReader, ImageRows

TOKENS = ("vision_start_token_id", "image_token_id", "vision_end_token_id")


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a model with a vision tower."""
    return getattr(config, "vision_config", None) is not None


def why_no_images(model: PreTrainedModel) -> str | None:
    """Why a model with a vision tower cannot be run here; None if it can, or has none."""
    if not sees_images(model.config):
        return None
    name = type(model).__name__
    rope: Any = getattr(model.config.get_text_config(), "rope_parameters", None)
    if "mrope_section" not in (rope or {}):
        return f"{name} has no multimodal rotary positions; expected Qwen2-VL, Qwen2.5-VL, Qwen3-VL"
    if "mm_encoder_outputs" not in inspect.signature(model.base_model.forward).parameters:
        return f"{name} takes no encoder outputs; expected transformers 5.20 or later"
    return None


def tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The vision tower; None of a model without."""
    found = getattr(model.base_model, "visual", None)
    assert found is None or isinstance(found, torch.nn.Module)
    return found


def load_reader(
    config: PreTrainedConfig, folders: list[str], tokenizer: PreTrainedTokenizerBase
) -> ImageReader | None:
    """The reader of a model's images; None for one without a vision tower.

    Args:
        folders: where the model's files are: its own folder or hub name, then its base's.

    Raises:
        ValueError: the model has no image processor that runs on Pillow, or no markup of images.
    """
    if not sees_images(config):
        return None
    own = (Path(folder) / "preprocessor_config.json" for folder in folders)
    where = next((str(path.parent) for path in own if path.is_file()), folders[-1])
    try:
        processor = AutoImageProcessor.from_pretrained(where, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"the image processor of {where} cannot be loaded: {first}") from error
    ids = [getattr(config, key, None) for key in TOKENS]
    names = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
    if len(names) < len(TOKENS) or not hasattr(processor, "merge_size"):
        raise ValueError(
            f"{folders[-1]}: {config.model_type} lacks one of {', '.join(TOKENS)}, merge_size; "
            "expected Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
        )
    opening, token, closing = map(str, names)
    return ImageReader(processor, opening, token, closing, config.image_token_id)


def image_inputs(model: PreTrainedModel, images: ImageRows | None) -> dict[str, Any]:
    """What a model's forward takes beside rows of tokens: its vision tower's outputs, with a graph
    only where the tower is trained."""
    if images is None:
        return {}
    seeing = tower(model)
    trained = seeing is not None and any(p.requires_grad for p in seeing.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        inner: Any = model.base_model
        seen = inner.get_image_features(images.pixel_values, images.grid_thw, return_dict=True)
        seen.pooler_output = _taken(seen.pooler_output, images)
        if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL
            seen.deepstack_features = [_taken(x, images) for x in seen.deepstack_features]
    return {"mm_encoder_outputs": {"image": seen}}


def _taken(parts: tuple[torch.Tensor, ...], images: ImageRows) -> tuple[torch.Tensor, ...]:
    return (torch.cat(list(parts)).index_select(0, images.features),)
