"""Vision-language models of the Qwen-VL family: the language side is trained, the tower is not.

Images come in through the model's own vision tower, under its own attention and without gradients.
Computed once, an image serves all sequences and branches that show it. Works for models that
transformers runs with multimodal rotary positions (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).
"""

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


def row_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, images: ImageRows | None
) -> dict[str, Any]:
    """What the decoder takes for rows of tokens [R, n]: their ids, or embeddings with the images in
    their places.

    The model's own forward would look for its image token, which a policy can sample as text. The
    tower has a graph only where it is trained.
    """
    if images is None:
        return {"input_ids": input_ids}
    inner: Any = model.base_model
    trained = any(p.requires_grad for p in inner.visual.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        seen = inner.get_image_features(images.pixel_values, images.grid_thw, return_dict=True)
    embedded = model.get_input_embeddings()(input_ids)
    features = _taken(seen.pooler_output, images).to(embedded.dtype)
    flat = embedded.flatten(0, 1).index_copy(0, images.rows, features)
    inputs: dict[str, Any] = {"inputs_embeds": flat.view_as(embedded)}
    deeper = getattr(seen, "deepstack_features", None)
    if deeper:  # Qwen3-VL adds features of earlier layers to its first hidden states
        mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        mask[images.rows] = True
        inputs["visual_pos_masks"] = mask.view(input_ids.shape)
        inputs["deepstack_visual_embeds"] = [_taken(x, images) for x in deeper]
    return inputs


def _taken(parts: tuple[torch.Tensor, ...], images: ImageRows) -> torch.Tensor:
    return torch.cat(list(parts)).index_select(0, images.features)
