"""Pretraining the small base model, and supervised fine-tuning."""

from dataclasses import dataclass, field

from regrpo.config.checks import require
from regrpo.config.run import LoraSettings, OptimConfig, check_execution, check_logging
from regrpo.provenance import PROVENANCES


@dataclass(frozen=True)
class PretrainConfig:
    """The small base model, pretrained on in-context copying.

    Args:
        out: folder of the run.
        hidden_size: width.
        num_layers: depth.
        num_heads: attention heads; those of the first layer start looking 1, 2, ... tokens back.
        tokenizer_tasks: generated tasks whose text the tokenizer is built from.
        steps: optimizer steps.
        optim: the optimizer.
        save_every: steps between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        seed: weights and data.
    """

    out: str
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 3
    tokenizer_tasks: int = 640
    steps: int = 500
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, warmup_steps=20))
    save_every: int = 250
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps > 0, "steps", self.steps, "1 or more")
        require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        check_logging(self.log_to, self.keep_checkpoints)
        # Rotary positions turn pairs of channels.
        heads = self.num_heads
        require(heads > 0, "num_heads", heads, "1 or more")
        require(
            self.hidden_size > 0 and self.hidden_size % (2 * heads) == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of 2 * num_heads={2 * heads}",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One data file of supervised fine-tuning.

    Args:
        path: .jsonl or .json records.
        mask: which turns are trained: "clean", every assistant turn; "rot", the reflection turn
            only; "repair", every assistant turn but the failed ones.
        reflections: "keep", or "strip" for failure-then-retry without reflection.
        provenance: origins that are trained on: executed, recorded, teacher; None is all.
        images: folder that paths of images are relative to; null is that of the data file.
    """

    path: str
    mask: str = "clean"
    reflections: str = "keep"
    provenance: tuple[str, ...] | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        require(
            self.provenance is None
            or (self.provenance != () and set(self.provenance) <= set(PROVENANCES)),
            "provenance",
            self.provenance,
            f"some of {', '.join(PROVENANCES)}, or null",
        )
        require(self.mask in ("clean", "rot", "repair"), "mask", self.mask, "clean, rot or repair")
        require(
            self.reflections in ("keep", "strip"), "reflections", self.reflections, "keep or strip"
        )


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on records.

    Args:
        model: Hugging Face name or path.
        out: folder of the run.
        data: data files.
        steps: optimizer steps.
        batch_tokens: tokens a step, at most, of all processes together.
        micro_batch_tokens: tokens of one forward and backward pass, at most; a step adds the passes
            up. null for one pass a step and process.
        max_length: longest sequence; longer ones are counted and left out.
        optim: the optimizer.
        lora: adapter settings.
        dtype: of the computation: "float32", "bfloat16", or "auto", what the model is saved in;
            weights that are trained are float32 in any case.
        gradient_checkpointing: keep the activations of layer boundaries only and compute the rest
            again in the backward pass.
        parallel: of several processes: "ddp", each has the whole model, or "fsdp", they share it.
        save_every: steps between checkpoints.
        keep_checkpoints: the newest checkpoints, so many, are kept.
        log_to: "wandb", "trackio" or both, beside metrics.jsonl and TensorBoard.
        seed: order of the data.
    """

    model: str
    out: str
    data: list[SourceConfig]
    steps: int = 400
    batch_tokens: int = 4096
    micro_batch_tokens: int | None = None
    max_length: int = 1024
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    parallel: str = "ddp"
    save_every: int = 100
    keep_checkpoints: int = 2
    log_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.data) > 0, "data", self.data, "at least one data file")
        require(self.steps > 0, "steps", self.steps, "1 or more")
        require(self.save_every > 0, "save_every", self.save_every, "1 or more")
        check_logging(self.log_to, self.keep_checkpoints)
        require(
            self.max_length <= self.batch_tokens,
            "max_length",
            self.max_length,
            f"at most batch_tokens={self.batch_tokens}",
        )
        micro = self.micro_batch_tokens
        require(
            micro is None or micro >= self.max_length,
            "micro_batch_tokens",
            micro,
            f"at least max_length={self.max_length}, or null",
        )
        check_execution(self.dtype, self.parallel)
