"""The model of a run, built as the run builds it but on the meta device: shapes, no memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from regrpo.config import SFTConfig, TrainConfig
from regrpo.modeling import CausalLM, base_model, freeze_tower, new_adapter
from regrpo.vision import tower

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
RunConfig = SFTConfig | TrainConfig


@dataclass(frozen=True)
class Precision:
    """Bytes of an element, as ``regrpo.packed_model`` has them.

    Attributes:
        frozen: of frozen weights. Trained ones have 4.
        compute: of matrix products and what they save.
        residual: of the stream between layers: that of the embedding, which autocast leaves alone.
    """

    frozen: int
    compute: int
    residual: int


def read_model_config(name_or_path: str, model_config: str | None) -> PreTrainedConfig:
    """The configuration of a model, or that in a file.

    Raises:
        FileNotFoundError: no such file. ValueError: there is none, or it cannot be read.
    """
    where = model_config or name_or_path
    if model_config is not None and not Path(model_config).is_file():
        raise FileNotFoundError(f"model_config: no file at {model_config}")
    if model_config is None and (Path(where) / "adapter_config.json").exists():
        where = str(PeftConfig.from_pretrained(where).base_model_name_or_path)
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        if model_config is not None:
            first = str(error).strip().split("\n")[0]
            raise ValueError(f"model_config: {where} cannot be read: {first}") from error
        raise ValueError(
            f"the configuration of {where} cannot be read; expected a folder with a model, a "
            "Hugging Face name that can be reached, or --model_config FILE with its config.json"
        ) from error


def build_on_meta(run: RunConfig, model_config: str | None = None) -> CausalLM:
    """The model with the adapter that ``regrpo.modeling.load_model`` gives it, without values.

    A vision tower is frozen, as the paper has it.

    Raises:
        NotImplementedError: a model whose layers are not attention and a gated MLP.
        ValueError: as `read_model_config`, or an adapter that does not fit the model.
    """
    config = read_model_config(run.model, model_config)
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next((k for k in kinds if type(config) in k._model_mapping), None)
    if kind is None:
        raise NotImplementedError(
            f"a model of type {config.model_type}; expected a language model, seeing or not"
        )
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config)
        _require_known_layers(model)
        freeze_tower(model)
        folder = Path(run.model)
        if model_config is None and (folder / "adapter_config.json").exists():
            saved = PeftConfig.from_pretrained(str(folder))
            assert isinstance(saved, LoraConfig)
            saved.inference_mode = False
            return get_peft_model(model, saved)
        lora = run.lora
        return new_adapter(model, lora.rank, lora.alpha, lora.targets) if lora.rank else model


def _require_known_layers(model: PreTrainedModel) -> None:
    # Of any architecture: also of those that have a decoder inside their base model (OPT).
    for layer in getattr(model.get_decoder(), "layers", [nn.Module()]):
        names = {n.split(".")[-1] for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        if names != {*ATTENTION, *GATED}:
            found = ", ".join(sorted(names)) or "other parts"
            raise NotImplementedError(
                f"{type(model).__name__} has layers of {found}; "
                f"expected {', '.join((*ATTENTION, *GATED))}: a dense decoder with a gated MLP"
            )


def vision_tower(model: CausalLM) -> Any:
    """What encodes images, a module; None of a model that reads text only."""
    return tower(base_model(model))


def adapted(model: CausalLM) -> bool:
    """Whether an adapter is trained, and not the model itself."""
    return base_model(model) is not model


def precision(run: RunConfig, model: CausalLM) -> Precision:
    """The run's dtypes; "auto" is what the model's configuration says."""
    saved = base_model(model).config.dtype
    low = run.dtype == "bfloat16" or (run.dtype == "auto" and saved == torch.bfloat16)
    frozen = 2 if low and adapted(model) else 4
    return Precision(frozen=frozen, compute=2 if low else 4, residual=frozen)


def text_config(model: CausalLM) -> PreTrainedConfig:
    """The configuration of the language model."""
    return base_model(model).config.get_text_config()


def head_dim(model: CausalLM) -> int:
    """Width of an attention head."""
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_heads(model: CausalLM) -> int:
    """Heads of keys and values."""
    config = text_config(model)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The matrix products of a module, by name."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def linear_numel(module: nn.Module, *, trained: bool = False) -> int:
    """Elements of the weights of matrix products, of trained ones only if asked."""
    found = (m.weight for _, m in linears(module))
    return sum(w.numel() for w in found if w.requires_grad or not trained)


def numel(module: nn.Module, *, trained: bool | None = None) -> int:
    """Parameters, tied ones once; trained or frozen ones only if asked."""
    return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))
