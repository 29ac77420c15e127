"""The linear ops: inputs of a case, and everything that computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import eager, peers
from bench.cases import ITEM_BYTES, LinearCase
from bench.machine import DEVICE
from bench.measure import Call, Case, Provider
from bench.rows import (
    SAMPLED,
    compiled,
    double_log_probs,
    implementations,
    no_grad,
    relative_error,
    trained,
)
from regrpo_kernels import Objective, linear_grpo_loss, linear_token_log_probs

OPS = ("linear_token_log_probs", "linear_grpo_loss")
GEMM_BYTES = 1 << 30  # the floor's buffer of logits


class Batch:
    """Hidden states and a head whose logits are about N(0, 2^2); one packed sequence."""

    def __init__(self, case: LinearCase) -> None:
        self.case = case
        dtype = getattr(torch, case.dtype)
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        self.hidden = normal(case.tokens, case.hidden).to(dtype).requires_grad_()
        weight = normal(case.vocab, case.hidden).mul_(2 / case.hidden**0.5).to(dtype)
        self.weight = weight.requires_grad_(case.head == "trained")
        self.labels = torch.randint(case.vocab, (case.tokens,), generator=generator, device=DEVICE)
        self.mask = trained(case.tokens, case.share, generator)
        self.masked_labels = self.labels.masked_fill(~self.mask, -100)
        with torch.no_grad():
            log_probs = linear_token_log_probs(self.hidden, weight, self.labels).log_probs
        self.old = log_probs + 0.1 * normal(case.tokens)
        self.ref = log_probs + 0.3 * normal(case.tokens)
        self.sequence_advantages = normal(1)
        self.advantages = self.sequence_advantages.expand(case.tokens).contiguous()
        self.tokens = [self.labels, self.advantages, self.old, self.ref, self.mask]
        self.at = self.mask.nonzero()[:SAMPLED, 0]
        self.expected = self._expected()

    def _expected(self) -> dict[str, Tensor]:
        rows = self.hidden.detach()[self.at].double().requires_grad_()
        labels, *tokens = (x[self.at] for x in self.tokens)
        logits = torch.cat(  # no fp64 copy of the head
            [rows @ part.double().T for part in self.weight.detach().split(8192)], dim=-1
        )
        log_probs, _ = double_log_probs(logits, labels)
        share = tokens[-1].sum() / self.mask.sum()
        (eager.objective(log_probs, *tokens) * share).backward()
        assert rows.grad is not None
        return {"log_probs": log_probs.detach(), "gradient": rows.grad}

    def restore(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradient_error(self, result: Any) -> float:
        """Relative error of the gradient of the sampled hidden states."""
        assert self.hidden.grad is not None
        assert (self.weight.grad is not None) == self.weight.requires_grad
        return relative_error(self.hidden.grad[self.at], self.expected["gradient"])

    def log_probs_error(self, result: Tensor) -> float:
        return relative_error(result[self.at], self.expected["log_probs"])


def backward(forward: Call) -> Call:
    return lambda: forward().backward()


def linear_measurement(op: str, batch: Batch) -> tuple[Case, list[Provider]]:
    case = batch.case
    gradient = op == "linear_grpo_loss"
    gemms = 1 if not gradient else 2 if case.head == "frozen" else 3
    make = _grpo_providers if gradient else _log_prob_providers
    providers = [*make(batch), _gemms_provider(batch, gemms)]
    for provider in providers:
        provider.flops = 2 * gemms * case.trained * case.vocab * case.hidden
    wide = case.dtype == "float32"
    record = {
        "op": op,
        "shape": case.shape,
        "tokens": case.tokens,
        "vocab": case.vocab,
        "hidden": case.hidden,
        "dtype": case.dtype,
        "share": case.share,
        "variant": case.variant,
        "logits_bytes": case.tokens * case.vocab * ITEM_BYTES[case.dtype],
    }
    error = batch.gradient_error if gradient else batch.log_probs_error
    return Case(batch.restore, error, 1e-4 if wide else 2e-2, record, case.once), providers


def _log_prob_providers(batch: Batch) -> list[Provider]:
    arguments = (batch.hidden, batch.weight, batch.labels)
    wide = 4 * batch.case.tokens * batch.case.vocab

    def ours(impl: str) -> Callable[[], Call]:
        def call() -> Tensor:
            return linear_token_log_probs(
                batch.hidden, batch.weight, batch.masked_labels, impl=impl
            ).log_probs

        return lambda: no_grad(call)

    function = eager.linear_log_probs
    return [
        *[Provider(f"ours {impl}", "ours", ours(impl)) for impl in implementations()],
        Provider("eager", "eager", lambda: no_grad(lambda: function(*arguments)), 2 * wide),
        Provider(
            "torch.compile",
            "torch.compile",
            lambda: no_grad(compiled(function, *arguments)),
            wide // 2,
        ),
        *peers.linear_log_prob_peers(batch),
    ]


def _grpo_providers(batch: Batch) -> list[Provider]:
    arguments = (batch.hidden, batch.weight, *batch.tokens)
    wide = 4 * batch.case.tokens * batch.case.vocab
    objective = Objective(beta=eager.BETA)

    def ours(impl: str) -> Callable[[], Call]:
        def call() -> Tensor:
            return linear_grpo_loss(
                batch.hidden,
                batch.weight,
                batch.labels,
                batch.advantages,
                old_log_probs=batch.old,
                ref_log_probs=batch.ref,
                loss_mask=batch.mask,
                objective=objective,
                impl=impl,
            ).loss

        return lambda: backward(call)

    providers = [Provider(f"ours {impl}", "ours", ours(impl)) for impl in implementations()]
    # eager holds log-probs, and in backward their gradient and that of the logits
    providers.append(
        Provider(
            "eager", "eager", lambda: backward(lambda: eager.linear_loss(*arguments)), 3 * wide
        )
    )
    if batch.case.share < 1:
        providers.append(
            Provider(
                "eager, trained rows only",
                "peer",
                lambda: backward(lambda: eager.linear_loss_of_selected(*arguments)),
                round(3 * wide * batch.case.share),
            )
        )
    if not batch.case.once:  # compiling takes memory of its own
        providers.append(
            Provider(
                "torch.compile",
                "torch.compile",
                lambda: backward(compiled(eager.linear_loss, *arguments)),
                wide,
            )
        )
    return [*providers, *peers.linear_grpo_peers(batch)]


def _gemms_provider(batch: Batch, gemms: int) -> Provider:
    """The matmuls of the trained rows alone, into memory that is already there."""
    case = batch.case
    item = ITEM_BYTES[case.dtype]
    rows = max(min(case.trained, GEMM_BYTES // (case.vocab * item)), 1)
    out_bytes = item * (rows * (case.vocab + case.hidden) + (gemms > 2) * case.vocab * case.hidden)

    def build() -> Call:
        hidden, weight = batch.hidden.detach()[batch.mask], batch.weight.detach()
        logits = hidden.new_empty(rows, case.vocab)
        dhidden = hidden.new_empty(rows, case.hidden)
        dweight = torch.empty_like(weight) if gemms > 2 else None

        def call() -> None:
            for part in hidden.split(rows):
                n = len(part)
                torch.mm(part, weight.T, out=logits[:n])
                if gemms > 1:
                    torch.mm(logits[:n], weight, out=dhidden[:n])
                if dweight is not None:
                    torch.mm(logits[:n].T, part, out=dweight)

        return call

    name = "1 GEMM" if gemms == 1 else f"{gemms} GEMMs"
    return Provider(name, "floor", build, out_bytes, checked=False)
