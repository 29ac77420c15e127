"""What SFT and RL share: optimizer, schedule, metrics, checkpoints, exact resume."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from regrpo.claim import claim
from regrpo.config import OptimConfig
from regrpo.errors import RunError
from regrpo.modeling import CausalLM
from regrpo.records import write_atomically

KEEP_CHECKPOINTS = 2


def build_optimizer(model: CausalLM, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, a plateau, and linear decay over the second half of the steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay = min(1.0, 2 * (1 - step / steps))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * decay)


class Run:
    """A training run in a folder: ``config.json, metrics.jsonl``, checkpoints and the model.

    Resumes by itself: a folder that holds a checkpoint of the same configuration goes on from it,
    bit for bit. One of another configuration, or whose ``data_files`` have changed, is refused.
    """

    def __init__(
        self,
        out: str | Path,
        config: Any,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        optim: OptimConfig,
        steps: int,
        data_files: Sequence[str] = (),
    ):
        self.out = Path(out)
        self.model = model
        self.tokenizer = tokenizer
        self.optim = optim
        self.steps = steps
        self.optimizer = build_optimizer(model, optim)
        self.step = 0
        # What else belongs to a checkpoint: numbers, texts, tensors, in lists and dicts.
        self.extra: dict[str, Any] = {}
        # Not where it is: a folder may be moved, or named from elsewhere.
        claimed = {key: value for key, value in asdict(config).items() if key != "out"}
        if data_files:
            claimed["sha256"] = {path: _sha256(path) for path in data_files}
        claim(self.out, claimed)
        self._resume()
        self._metrics = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(self.out / "tensorboard"), purge_step=self.step, flush_secs=10
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc: object) -> None:
        self._metrics.close()
        self._tensorboard.close()

    @property
    def model_path(self) -> Path:
        return self.out / "model"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def _resume(self) -> None:
        found = self._checkpoints()
        if not found:
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
            return
        # Generator states stay on the CPU; what belongs to the model is copied to its device.
        state = torch.load(found[-1] / "state.pt", weights_only=True, map_location="cpu")
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in state["model"].items():
                trained[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step = state["step"]
        self.extra = state.get("extra", {})  # older checkpoints have none
        # Steps behind the checkpoint are done again; their metrics come again with them.
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) < self.step]
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step-*"))

    def update(self) -> float:
        """Clips gradients, takes one optimizer step, returns the gradient norm.

        Raises:
            RunError: the gradient is not finite; the weights are still those of before.
        """
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], self.optim.grad_clip
        )
        if not torch.isfinite(norm):
            raise RunError(
                f"step {self.step}: gradient norm is {norm.item()}; the last checkpoint in "
                f"{self.out} is intact"
            )
        lr = learning_rate(self.step, self.steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def log(self, metrics: dict[str, float]) -> None:
        """Appends one line of metrics for the current step."""
        self._metrics.write(json.dumps({"step": self.step, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, self.step)

    def finish_step(self, save_every: int) -> None:
        """Counts the step; saves a checkpoint every ``save_every`` steps and at the end."""
        self.step += 1
        if self.step % save_every == 0 or self.step == self.steps:
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        final = self.out / "checkpoints" / f"step-{self.step:07d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        state = {
            "step": self.step,
            "model": {name: p.detach() for name, p in trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "extra": self.extra,
        }
        if self.device.type == "cuda":  # dropout draws there
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        torch.save(state, partial / "state.pt")
        os.replace(partial, final)
        for old in self._checkpoints()[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    def save_model(self) -> None:
        """Saves model (or adapter) and tokenizer; loads with plain ``from_pretrained``."""
        save_pretrained(self.model, self.tokenizer, self.model_path)


def save_pretrained(model: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes model and tokenizer into a folder that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial))
    tokenizer.save_pretrained(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def mean(values: Iterable[float]) -> float:
    """The mean, 0.0 of nothing."""
    items = list(values)
    return sum(items) / len(items) if items else 0.0


def _step_of(line: str) -> int:
    """The step of a metrics line; a torn last line counts as not written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
