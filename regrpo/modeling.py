"""Hugging Face causal language models, packed.

Models are loaded as they are, with LoRA or full weights, and run over packed sequences through
transformers' attention interface: nothing is patched. The trainer asks for hidden states; the head
is applied to trained tokens only.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from regrpo.images import ImageReader
from regrpo.packing import PackedBatch
from regrpo.prefix_tree import single_nodes
from regrpo.tree_attention import AttentionPlan, tree_attention
from regrpo.vision import load_reader, row_inputs, sees_images, tower, why_no_images

PACKED = "regrpo_packed"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
CausalLM = PreTrainedModel | PeftModel


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention along the branches; query [1, heads, S, D] -> [1, S, heads, D]."""
    if s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention sinks; expected none")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    with _autocast_by_hand(query.device.type) as dtype:
        if dtype is not None:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        out = tree_attention(
            query,
            key,
            value,
            plan,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            dropout=dropout,
        )
    return out[None], None


@contextlib.contextmanager
def _autocast_by_hand(device: str) -> Iterator[torch.dtype | None]:
    """A block of operators that autocast does not know; what it would cast to, None without it."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield None
        return
    with torch.autocast(device, enabled=False):
        yield torch.get_autocast_dtype(device)


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(PACKED, _packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)


def _require_folder_or_name(name_or_path: str) -> None:
    """Raises FileNotFoundError for a path without a folder: the hub would be asked for it."""
    path = Path(name_or_path)
    is_path = path.is_absolute() or len(path.parts) != 2 or Path(path.parts[0]).is_dir()
    if "/" in name_or_path and is_path and not path.is_dir():
        raise FileNotFoundError(
            f"no model at {name_or_path}; expected a folder that holds one, or a Hugging Face name"
        )


def _require_model(folder: Path) -> None:
    """Raises FileNotFoundError for a folder without a model."""
    if not _holds_model(folder):
        inside = folder / "model"
        hint = f"; did you mean {inside}?" if _holds_model(inside) else ""
        raise FileNotFoundError(
            f"no model in {folder}; expected its config.json or adapter_config.json{hint}"
        )


def _holds_model(folder: Path) -> bool:
    """Whether a folder has a model's configuration; a run's own config.json has no model type."""
    config = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        return True
    return config.exists() and '"model_type"' in config.read_text(encoding="utf-8")


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turns what transformers says to a model that cannot be loaded into one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{what} cannot be loaded: {first}") from error


def _absolute(name_or_path: str) -> str:
    """A folder's absolute path, which an adapter on it keeps; a hub name as it is."""
    path = Path(name_or_path)
    return str(path.resolve()) if path.is_dir() else name_or_path


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer; offsets are needed to place segments.

    Raises:
        FileNotFoundError: a path without a tokenizer. ValueError: it cannot be loaded, or is not a
            fast one.
    """
    _require_folder_or_name(name_or_path)
    name_or_path = _tokenizer_of(name_or_path)
    with _loading(f"the tokenizer of {name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name_or_path!r} is not a fast one; expected tokenizer.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_of(name_or_path: str) -> str:
    """Where the tokenizer is: an adapter may leave it with its base model."""
    folder = Path(name_or_path)
    if not folder.is_dir() or any((folder / name).exists() for name in TOKENIZER_FILES):
        return name_or_path
    _require_model(folder)
    base = _base_of(name_or_path)
    if base is not None:
        return base
    raise FileNotFoundError(f"no tokenizer in {folder}; expected tokenizer.json")


def _base_of(name_or_path: str) -> str | None:
    """The model that an adapter in a folder is for; None if there is no adapter."""
    adapter = Path(name_or_path) / "adapter_config.json"
    if not adapter.exists():
        return None
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])


def load_image_reader(name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> ImageReader | None:
    """What makes images of files for a model; None for one that sees none.

    Raises:
        ValueError: it sees images, but its image processor or its markup is missing.
    """
    base = _base_of(name_or_path)
    with _loading(f"the configuration of {base or name_or_path}"):
        config = AutoConfig.from_pretrained(base or name_or_path)
    folders = [name_or_path] if base is None else [name_or_path, base]
    return load_reader(config, folders, tokenizer)


def default_device() -> torch.device:
    """The GPU where there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _require_device(device: torch.device | str | None) -> None:
    """Raises ValueError for a device that is not there."""
    try:
        found = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}; expected cpu, cuda or cuda:0, ...") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {device!r}; this machine has {torch.cuda.device_count()} CUDA devices"
        )


def place(model: torch.nn.Module, device: torch.device | str | None = None) -> None:
    """Moves a model to a device; None is ``default_device()``."""
    model.to(default_device() if device is None else device)


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    trainable: bool = True,
    lora_rank: int = 0,
    lora_alpha: int = 32,
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> CausalLM:
    """Loads any Hugging Face causal LM, a Qwen-VL model, or an adapter on one.

    A vision tower is frozen.

    Args:
        name_or_path: hub name or folder; a folder with ``adapter_config.json`` is loaded with its
            base. An adapter on a folder keeps the folder's absolute path.
        dtype: of the weights; "auto" for what they are saved in.
        device: where its weights go; None for ``default_device()``.
        trainable: False for a model that is only sampled from, which need not be one that can be
            packed.
        lora_rank: 0 trains all weights; of an adapter that is loaded, the adapter.

    Raises:
        FileNotFoundError: a path without a model.
        NotImplementedError: the model keeps a recurrent state; or a trainable one scales its
            logits behind the head, or mixes tokens in another way than by attention that can be
            packed.
        ValueError: the model cannot be loaded, there is no such device, or ``lora_rank`` is not
            that of the adapter.
    """
    _require_folder_or_name(name_or_path)
    if Path(name_or_path).is_dir():
        _require_model(Path(name_or_path))
    _require_device(device)
    if (Path(name_or_path) / "adapter_config.json").exists():
        with _loading(name_or_path):
            adapted = _load_adapted(name_or_path, dtype, trainable)
        _require_supported(base_model(adapted), trainable)
        adapter = adapted.active_peft_config
        adapter.base_model_name_or_path = _absolute(adapter.base_model_name_or_path)
        rank = adapter.r
        if lora_rank not in (0, rank):
            raise ValueError(
                f"lora_rank is {lora_rank}, but {name_or_path} holds an adapter of rank {rank}; "
                "expected the same, or 0"
            )
        place(adapted, device)
        return adapted
    with _loading(name_or_path):
        model = _auto_model(name_or_path).from_pretrained(_absolute(name_or_path), dtype=dtype)
    _require_supported(model, trainable)
    freeze_tower(model)
    place(model, device)
    return new_adapter(model, lora_rank, lora_alpha, lora_targets) if lora_rank else model


def new_adapter(model: PreTrainedModel, rank: int, alpha: int, targets: Sequence[str]) -> PeftModel:
    """The model under a new LoRA adapter on the modules of these names, of the language side."""
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        exclude_modules=None if tower(model) is None else r".*\bvisual\b.*",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _auto_model(name_or_path: str) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    seeing = sees_images(AutoConfig.from_pretrained(name_or_path))
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def _load_adapted(name_or_path: str, dtype: torch.dtype | str, trainable: bool) -> PeftModel:
    """An adapter on its base; peft's own loader knows the classes of language models only."""
    base = _base_of(name_or_path)
    assert base is not None
    if _auto_model(base) is AutoModelForCausalLM:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, is_trainable=trainable
        )
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, name_or_path, is_trainable=trainable)


def freeze_tower(model: PreTrainedModel) -> None:
    """A vision tower is not trained, whatever is."""
    seeing = tower(model)
    if seeing is not None:
        seeing.requires_grad_(False)


def _require_supported(model: PreTrainedModel, trainable: bool) -> None:
    name = type(model).__name__
    if model._is_stateful:
        raise NotImplementedError(
            f"{model.name_or_path}: {name} keeps a recurrent state; expected attention"
        )
    reason = why_no_images(model)
    if reason is not None:
        raise NotImplementedError(f"{model.name_or_path}: {reason}")
    reason = why_not_packed(model)
    if trainable and reason is not None:
        raise NotImplementedError(f"{model.name_or_path}: {reason}")


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why a model cannot be run on packed sequences with attention and head of our own; None if it
    can."""
    config = model.config.get_text_config()
    for field in ("logits_scaling", "logit_scale"):
        if getattr(config, field, None) not in (None, 1):
            return f"config.{field}={getattr(config, field)}; expected none"
    # Other layers would let packed sequences see each other, without an error.
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = layers - {"full_attention", "sliding_attention"}
    if other or not model._supports_attention_backend:
        what = ", ".join(sorted(other)) or "its own attention"
        return (
            f"{type(model).__name__} has {what}; "
            "expected attention through transformers' AttentionInterface in every layer"
        )
    return None


def base_model(model: CausalLM) -> PreTrainedModel:
    """The transformers model under an adapter, or the model itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def decoder(model: CausalLM) -> Any:
    """The layers of a language model, or those behind a vision tower, without the head: a
    ``PreTrainedModel``, whose parts are not typed."""
    inner: Any = base_model(model).base_model
    return inner if tower(base_model(model)) is None else inner.language_model


@contextlib.contextmanager
def attention(model: CausalLM, implementation: str) -> Iterator[None]:
    """Runs a block with another attention implementation; inside of one with the same it is free,
    where setting it visits every module."""
    inner = decoder(model)
    before = inner.config._attn_implementation
    if before == implementation:
        yield
        return
    inner.set_attn_implementation(implementation)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def hidden_states(model: CausalLM, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states of a packed batch, whose sequences never see each other.

    [T, H]; of a batch with a prefix tree [S, H], each shared token once (``batch.computed``).
    """
    nodes = single_nodes(batch.cu_seqlens.tolist()) if batch.tree is None else batch.tree.nodes
    rows = batch if batch.tree is None else batch.tree
    with attention(model, PACKED):
        output = decoder(model)(
            position_ids=rows.position_ids.unsqueeze(-2),
            use_cache=False,
            plan=AttentionPlan(nodes, rows.input_ids.device),
            **row_inputs(base_model(model), rows.input_ids[None], batch.images),
        )
    return output.last_hidden_state[0]


def logit_softcap(model: CausalLM) -> float | None:
    """The cap of the model's logits (Gemma 2), for ``Objective.softcap``; None without one."""
    config = base_model(model).config.get_text_config()
    return getattr(config, "final_logit_softcapping", None)


def head(model: CausalLM) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, H] and bias [V] of the language-model head."""
    layer = base_model(model).get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)
