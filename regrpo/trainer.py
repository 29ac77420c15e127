"""What SFT and RL share: optimizer, schedule, metrics, checkpoints, exact resume."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from regrpo.claim import claim
from regrpo.config import OptimConfig
from regrpo.distributed import ALONE, Ranks
from regrpo.errors import RunError
from regrpo.images import ImageReader
from regrpo.modeling import CausalLM
from regrpo.records import write_atomically
from regrpo.sharding import is_sharded, like, whole, whole_state
from regrpo.trackers import Trackers, require_trackers

METRICS = "metrics.jsonl"
LOGS = (METRICS, "trajectories.jsonl")
CONFIG = "config.json"
# Where a run is and what it tells: may change from one start to the next, and it is the same run.
UNCLAIMED = ("out", "keep_checkpoints", "log_to", "log_trajectories_every", "log_groups")
CLAIMED_OF_ROLLOUT = (
    "backend",
    "model",
    "processed_log_probs",
)  # where the server is and how it is waited for is not


def build_optimizer(model: CausalLM, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of a step, which counts from 0.

    With w warm-up steps, n steps and a final share f it is ``lr`` times::

        step < w   (step + 1) / w
        linear     f + (1 - f) min(1, 2 (1 - step / n))
        cosine     f + (1 - f) (1 + cos(pi (step - w) / (n - w))) / 2
        constant   1
    """
    warmup, final = config.warmup_steps, config.final_lr_share
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        decay = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    else:
        decay = min(1.0, 2 * (1 - step / steps))
    return config.lr * (final + (1 - final) * decay)


class Run:
    """A training run in a folder: ``config.json, metrics.jsonl``, checkpoints and the model.

    Resumes by itself: a folder that holds a checkpoint of the same configuration goes on from it,
    bit for bit. One of another configuration or number of processes, or whose ``data_files`` have
    changed, is refused.

    Of several processes (``ranks``) the first one writes, and all of them read; so the folder is on
    a file system that they share.
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
        ranks: Ranks = ALONE,
        reader: ImageReader | None = None,
    ):
        require_trackers(config.log_to)
        self.out = Path(out)
        self.ranks = ranks
        self.model = model
        self.tokenizer = tokenizer
        self.reader = reader
        self.optim = optim
        self.steps = steps
        self.optimizer = build_optimizer(model, optim)
        self.step = 0
        # What else belongs to a checkpoint: numbers, texts, tensors, in lists and dicts.
        self.extra: dict[str, Any] = {}
        self.keep_checkpoints: int = config.keep_checkpoints
        claimed = {key: value for key, value in asdict(config).items() if key not in UNCLAIMED}
        if "rollout" in claimed:
            claimed["rollout"] = {key: claimed["rollout"][key] for key in CLAIMED_OF_ROLLOUT}
        if data_files:
            claimed["sha256"] = {path: _sha256(path) for path in data_files}
        if ranks.size > 1:
            claimed["processes"] = ranks.size
            ranks.require_same(claimed, "the configuration")
        if ranks.main:
            claim(self.out, claimed)
        ranks.wait()
        if not (self.out / CONFIG).exists():
            raise RunError(
                f"rank {ranks.rank} of {ranks.size} finds no {CONFIG} in {self.out}, where rank 0 "
                "wrote it; expected a folder that all processes share"
            )
        self._resume()
        self._logs: dict[str, TextIO] = {}
        self._tensorboard: SummaryWriter | None = None
        if ranks.main:
            with self._writing("tensorboard"):
                self._tensorboard = SummaryWriter(
                    str(self.out / "tensorboard"), purge_step=self.step, flush_secs=10
                )
        self._trackers = Trackers(config.log_to if ranks.main else (), self.out, claimed)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What could not be written is tried again on closing, and is known already.
        with contextlib.suppress(OSError) if kind else self._writing("the logs"):
            for log in self._logs.values():
                log.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        self._trackers.finish()

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
        self.ranks.require_same([path.name for path in found], f"the checkpoints in {self.out}")
        if not found:
            if self.ranks.main:
                for name in LOGS:
                    (self.out / name).unlink(missing_ok=True)
            return
        # Generator states stay on the CPU; what belongs to the model is copied to its device.
        state = torch.load(found[-1] / "state.pt", weights_only=True, map_location="cpu")
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in state["model"].items():
                trained[name].copy_(like(value, trained[name]))
        self._load_optimizer(state["optimizer"])
        own = state["ranks"][self.ranks.rank]
        torch.set_rng_state(own["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)
        self.step = state["step"]
        self.extra = own["extra"]
        if not self.ranks.main:
            return
        # Steps behind the checkpoint are done again; what they log comes again with them.
        for path in (self.out / name for name in LOGS if (self.out / name).exists()):
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) < self.step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in state["state"].items():
            parameter = parameters[index]
            for name, value in moments.items():
                if value.shape == parameter.shape:  # not the count of steps
                    moments[name] = like(value, parameter)
        self.optimizer.load_state_dict(state)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step-*"))

    def update(self) -> float:
        """Adds gradients up over processes, clips, takes one optimizer step; returns their norm.

        Raises:
            RunError: the gradient is not finite; the weights are still those of before.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not is_sharded(self.model):  # shards were added up in backward
            self.ranks.sum_gradients(trained)
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, self.optim.grad_clip))
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

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A failure to write (a full disk, say) becomes one line that says where the run stands."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            found = self._checkpoints()
            raise RunError(
                f"step {self.step}: cannot write {what} in {self.out}: "
                f"{getattr(error, 'strerror', None) or error}; "
                + (f"{found[-1].name} is intact" if found else "there is no checkpoint yet")
                + "; the same command goes on from there"
            ) from error

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Appends one line to a log of the run, one of ``LOGS``; it holds its ``step``.

        Nothing in any process but the first.
        """
        if not self.ranks.main:
            return
        with self._writing(name):
            if name not in self._logs:
                self._logs[name] = (self.out / name).open("a", encoding="utf-8")
            self._logs[name].write(json.dumps(line) + "\n")
            self._logs[name].flush()

    def log(self, metrics: dict[str, float]) -> None:
        """Logs the metrics of the current step, in the first process."""
        self.append(METRICS, {"step": self.step, **metrics})
        if self._tensorboard is not None:
            with self._writing("tensorboard"):
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, self.step)
        self._trackers.log(metrics, self.step)

    def finish_step(self, save_every: int) -> None:
        """Counts the step; saves a checkpoint every ``save_every`` steps and at the end."""
        self.step += 1
        if self.step % save_every == 0 or self.step == self.steps:
            with self._writing("a checkpoint"):
                self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        """Collects the state of all processes and writes it in the first one."""
        own: dict[str, Any] = {"torch_rng": torch.get_rng_state(), "extra": self.extra}
        if self.device.type == "cuda":  # dropout draws there
            own["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        state = {
            "step": self.step,
            "model": whole_state(trained, self.ranks.main),
            "optimizer": whole_state(self.optimizer.state_dict(), self.ranks.main),
            "ranks": self.ranks.gather(own),
        }
        if self.ranks.main:
            self._write_checkpoint(state)

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        for log in self._logs.values():  # a checkpoint never knows more steps than the logs
            os.fsync(log.fileno())
        final = self.out / "checkpoints" / f"step-{self.step:07d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with (partial / "state.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial)  # half a checkpoint on a full disk
            # torch.save may fail once more while it closes a file that cannot be written.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        os.replace(partial, final)
        for old in self._checkpoints()[: -self.keep_checkpoints]:
            shutil.rmtree(old)

    def save_model(self) -> None:
        """Saves model (or adapter) and tokenizer; loads with plain ``from_pretrained``."""
        weights = None
        if is_sharded(self.model):
            weights = whole_state(self.model.state_dict(keep_vars=True), self.ranks.main)
        if self.ranks.main:
            with self._writing("the model"):
                save_pretrained(self.model, self.tokenizer, self.model_path, weights, self.reader)
        self.ranks.wait()


def save_pretrained(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    weights: dict[str, torch.Tensor] | None = None,
    reader: ImageReader | None = None,
) -> None:
    """Writes model and tokenizer into a folder that appears whole or not at all.

    Args:
        reader: of a vision-language model's images, whose processor is written as well.
        weights: what the model's own ``state_dict`` would be, were it not sharded.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), state_dict=weights)
    tokenizer.save_pretrained(partial)
    if reader is not None:
        reader.processor.save_pretrained(partial)
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
