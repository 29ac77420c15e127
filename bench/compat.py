"""The peers' entry points, on our kernels and on their own: a step of TRL's GRPOTrainer with and
without `patch_grpo_trainer`, and Liger's functions beside those of `regrpo_kernels.compat.liger`.

Both ways get the same call on the same data; what the other one gives is what ours is compared
with (`tests/compat` compares both with fp64).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.cases import PaddedCase, StepCase
from bench.machine import DEVICE
from bench.measure import Call, Case, Provider
from bench.rows import relative_error
from bench.trainer import HIDDEN, LAYER_WEIGHTS, LAYERS, build_base, grpo_trainer
from regrpo_kernels import linear_token_log_probs
from regrpo_kernels.compat import liger
from regrpo_kernels.compat.trl import patch_grpo_trainer

LINEAR, *FROM_LOGITS = ENTRY_POINTS = (
    "LigerFusedLinearGRPOLoss",
    "triton_grpo_loss",
    "fused_selective_log_softmax",
)


class Compared:
    """The tensors that the first call returned, which those of the others should be."""

    def __init__(self) -> None:
        self.expected: list[Tensor] | None = None

    def error(self, result: list[Tensor]) -> float:
        """The largest relative distance of a tensor; of a loss, relative to 0.01 at least."""
        if self.expected is None:
            self.expected = [x.detach().clone() for x in result]
        pairs = zip(result, self.expected, strict=True)
        return max(_distance(found, x) for found, x in pairs)


def _distance(found: Tensor, expected: Tensor) -> float:
    return relative_error(found, expected.double(), 0.01 if expected.dim() == 0 else 1e-30)


# --- TRL ------------------------------------------------------------------------------------------


class Step(Compared):
    """Scored samples, and two trainers with the same weights: TRL's, and one that is patched."""

    def __init__(self, case: StepCase) -> None:
        super().__init__()
        self.case = case
        generator = torch.Generator().manual_seed(0)
        longest = max(case.lengths)
        ids = torch.randint(case.vocab, (case.group, case.context + longest), generator=generator)
        mask = (torch.arange(longest) < torch.tensor(case.lengths).unsqueeze(-1)).long()
        prompts = ids[:, : case.context]
        self.trainers = {"trl": self._trainer(), "ours": patch_grpo_trainer(self._trainer())}
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": ids[:, case.context :] * mask,
            "completion_mask": mask,
            "advantages": torch.randn(case.group, generator=generator),
            "num_items_in_batch": mask.sum(),
        }
        noise = 0.1 * torch.randn(mask.shape, generator=generator)
        self.inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
        self.inputs["old_per_token_logps"] = self._log_probs() + noise.to(DEVICE)

    def _trainer(self) -> Any:
        return grpo_trainer(build_base(self.case).train(), self.case.group)

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        trainer, inputs = self.trainers["ours"], self.inputs
        ids, mask = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1)
            for name in ("ids", "mask")
        )
        length = inputs["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]

    def restore(self) -> None:
        for trainer in self.trainers.values():
            trainer.model.zero_grad(set_to_none=True)

    def call(self, name: str) -> Call:
        trainer = self.trainers[name]

        def call() -> list[Tensor]:
            loss = trainer.compute_loss(trainer.model, self.inputs)
            loss.backward()
            return [loss.detach(), *(p.grad for p in trainer.model.parameters())]

        return call


def step_flops(case: StepCase, ours: bool) -> int:
    """Floating-point operations of a step, by the matmuls.

    The body is computed for prompts and padded completions: 6 a weight and token, and for scores
    and values 4 a pair and channel, with 2.5 times that backward. The head: three matmuls of the
    trained tokens in ours. TRL makes the logits again in backward, and on a CPU it scores every
    position.
    """
    padded = case.context + max(case.lengths)
    body = 6 * LAYERS * LAYER_WEIGHTS * case.group * padded
    attention = LAYERS * HIDDEN * 4 * (1 + 2.5) * case.group * padded**2 / 2
    scored = sum(case.lengths)
    if not ours and DEVICE.type == "cpu":
        scored = case.group * (padded - 1)
    return round(body + attention + (3 if ours else 4) * 2 * scored * case.vocab * HIDDEN)


def step_measurement(step: Step) -> tuple[Case, list[Provider]]:
    case = step.case
    step.error(step.call("trl")())
    step.restore()
    providers = [
        Provider("trl, patched", "ours", lambda: step.call("ours")),
        Provider("trl", "peer", lambda: step.call("trl")),
    ]
    for provider in providers:
        provider.flops = step_flops(case, provider.kind == "ours")
    record = {
        "op": "trl step",
        "shape": case.shape,
        "tokens": case.tokens,
        "vocab": case.vocab,
        "hidden": HIDDEN,
        "dtype": case.dtype,
        "share": sum(case.lengths) / case.tokens,
        "variant": "",
        "logits_bytes": case.tokens * case.vocab * 4,
    }
    return Case(step.restore, step.error, _tolerance(case.dtype), record), providers


def _tolerance(dtype: str) -> float:
    return 1e-3 if dtype == "float32" else 5e-2


# --- Liger ----------------------------------------------------------------------------------------


class Padded(Compared):
    """Completions of different lengths, as hidden states before a head or as logits."""

    def __init__(self, case: PaddedCase, entry_point: str) -> None:
        super().__init__()
        self.case, self.entry_point = case, entry_point
        shape, dtype = (case.group, case.length), getattr(torch, case.dtype)
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=DEVICE)

        self.ids = torch.randint(case.vocab, shape, generator=generator, device=DEVICE)
        lengths = torch.tensor(case.lengths, device=DEVICE)
        self.mask = (torch.arange(case.length, device=DEVICE) < lengths.unsqueeze(-1)).int()
        self.advantages = normal(case.group)
        hidden = normal(*shape, case.hidden).to(dtype)
        weight = normal(case.vocab, case.hidden).mul_(2 / case.hidden**0.5).to(dtype)
        log_probs = linear_token_log_probs(hidden, weight, self.ids).log_probs
        self.old, self.ref = log_probs + 0.1 * normal(*shape), log_probs + 0.3 * normal(*shape)
        if entry_point == LINEAR:
            self.leaves = [hidden.requires_grad_(), weight.requires_grad_()]
            return
        self.original = torch.nn.functional.pad(hidden @ weight.T, (0, 0, 0, 1))
        self.leaves = [self.original.clone().requires_grad_()]

    def restore(self) -> None:
        if self.entry_point != LINEAR:  # its gradient was written over it
            self.leaves[0].detach().copy_(self.original)

    def call(self, peer: ModuleType) -> Call:
        """The entry point of Liger or of ours, called with Liger's defaults."""
        function = getattr(peer, self.entry_point)
        if self.entry_point == LINEAR:
            module = function()
            return lambda: self._gradients(
                module(
                    *self.leaves,
                    self.ids,
                    self.mask,
                    self.advantages,
                    ref_per_token_logps=self.ref,
                    old_per_token_logps=self.old,
                )[0]
            )
        if self.entry_point == "triton_grpo_loss":
            samples = (self.old, self.ref, self.ids, self.advantages, self.mask)
            return lambda: self._gradients(function(self.leaves[0], *samples, reduce=True)[0])
        return lambda: [function(self.leaves[0].detach(), self.ids, mask=self.mask)]

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves)]


def liger_flops(case: PaddedCase, ours: bool) -> int:
    """Of the head's matmuls: three of the trained tokens in ours; Liger makes the logits again in
    backward, and those of the padding, too.
    """
    rows = 3 * sum(case.lengths) if ours else 4 * case.group * case.length
    return 2 * rows * case.vocab * case.hidden


def padded_measurement(batch: Padded) -> tuple[Case, list[Provider]]:
    case = batch.case
    theirs = liger_module(batch.entry_point)
    batch.error(batch.call(theirs)())
    batch.restore()
    providers = [
        Provider("compat.liger", "ours", lambda: batch.call(liger)),
        Provider("liger", "peer", lambda: batch.call(theirs)),
    ]
    if batch.entry_point == LINEAR:
        for provider in providers:
            provider.flops = liger_flops(case, provider.kind == "ours")
    record = {
        "op": batch.entry_point,
        "shape": case.shape,
        "tokens": sum(case.lengths),
        "vocab": case.vocab,
        "hidden": case.hidden,
        "dtype": case.dtype,
        "share": sum(case.lengths) / (case.group * case.length),
        "variant": "",
        "logits_bytes": case.logits_bytes,
    }
    return Case(batch.restore, batch.error, _tolerance(case.dtype), record), providers


def liger_module(entry_point: str) -> ModuleType:
    import liger_kernel.chunked_loss
    import liger_kernel.transformers.grpo_loss

    return (
        liger_kernel.chunked_loss if entry_point == LINEAR else liger_kernel.transformers.grpo_loss
    )
