"""The row ops: inputs of a case, and everything that computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import eager, peers
from bench.cases import RowCase
from bench.machine import DEVICE
from bench.measure import Call, Case, Provider
from regrpo_kernels import Objective, build_info, grpo_loss, token_log_probs

OPS = ("token_log_probs", "token_log_probs + entropy", "grpo_loss")
SAMPLED = 8  # rows that are compared with fp64


class Batch:
    """Logits of `[sequences, length + 1, V]`, whose last position predicts nothing.

    `logits` and `labels` are the case's view of them; `padded` is the whole, for peers that want
    it. Both are leaves over the same memory. Advantages are one a sequence (what every peer can
    do), given to ours and eager as one a token.
    """

    def __init__(self, case: RowCase) -> None:
        self.case = case
        packed = case.view == "packed"
        self.sequences = 1 if packed else min(4, case.tokens)
        self.length = case.tokens // self.sequences
        shape = (self.sequences, self.length + 1, case.vocab)
        dtype = getattr(torch, case.dtype)
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.original = torch.empty(shape, dtype=dtype, device=DEVICE)
        tokens = (self.sequences, self.length)
        labels = torch.randint(case.vocab, tokens, generator=generator, device=DEVICE)
        fill_logits(self.original, labels, case.logits, generator)
        self.storage = self.original.clone()
        mask = trained(self.sequences * self.length, case.share, generator).view(tokens)
        view = self.original[:, :-1]
        with torch.no_grad():
            log_probs = token_log_probs(view, labels).log_probs
        noise = torch.randn(2, *tokens, generator=generator, device=DEVICE)
        self.sequence_advantages = torch.randn(self.sequences, generator=generator, device=DEVICE)
        advantages = self.sequence_advantages[:, None].expand(tokens).contiguous()
        old, ref = log_probs + 0.1 * noise[0], log_probs + 0.3 * noise[1]
        self.padded_tokens = [labels, advantages, old, ref, mask]
        self.tokens = [x.flatten() if packed else x for x in self.padded_tokens]
        self.labels, self.advantages, self.old, self.ref, self.mask = self.tokens
        self.masked_labels = self.labels.masked_fill(~self.mask, -100)
        leaf = self.storage[0, :-1] if packed else self.storage[:, :-1]
        self.logits = leaf.detach().requires_grad_()
        self.padded = self.storage.detach().requires_grad_()
        # sampled rows, for the check
        self.at = mask.nonzero()[:SAMPLED].unbind(1)
        self.expected = self._expected()

    def _expected(self) -> dict[str, Tensor]:
        rows = self.original[self.at].double().requires_grad_()
        labels, *tokens = (x[self.at] for x in self.padded_tokens)
        log_probs, entropy = double_log_probs(rows, labels)
        share = tokens[-1].sum() / self.mask.sum()
        (eager.objective(log_probs, *tokens) * share).backward()
        assert rows.grad is not None
        return {
            "log_probs": log_probs.detach(),
            "entropy": entropy.detach(),
            "gradient": rows.grad,
        }

    def restore(self) -> None:
        self.logits.grad = self.padded.grad = None
        self.storage.copy_(self.original)

    def gradient_error(self, gradient: Tensor) -> float:
        """Relative error of the gradient of the sampled rows: of `logits` or of `padded`."""
        found = gradient.view(self.sequences, -1, self.case.vocab)[self.at]
        # of a row that is nearly certain, little is left of fp32: 1 % of a token's weight at least
        least = 0.01 * len(found) ** 0.5 / self.mask.sum().item()
        return relative_error(found, self.expected["gradient"], least)

    def log_probs_error(self, result: Any) -> float:
        """Of log-probs, or the larger one of log-probs and entropy."""
        pairs = [(result if isinstance(result, Tensor) else result[0], "log_probs")]
        if not isinstance(result, Tensor) and result[-1] is not None:
            pairs.append((result[-1], "entropy"))
        least = len(self.at[0]) ** 0.5  # one nat a row
        return max(
            relative_error(x.view(self.sequences, self.length)[self.at], self.expected[name], least)
            for x, name in pairs
        )


def double_log_probs(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(rows, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def relative_error(found: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """Against the norm of what is expected, or `least` where that is smaller."""
    difference = (found.detach().double() - expected).norm() / expected.norm().clamp(min=least)
    return difference.item()


def fill_logits(out: Tensor, labels: Tensor, kind: str, generator: torch.Generator) -> None:
    vocab = out.shape[-1]
    step = max((1 << 24) // vocab, 1)
    for rows in out.view(-1, vocab).split(step):  # no fp32 copy of the whole
        rows.copy_(torch.randn(rows.shape, generator=generator, device=DEVICE) * 2)
    if kind == "peaked":  # half of the labels are the token that nearly has all of the probability
        likely = torch.rand(labels.shape, generator=generator, device=DEVICE) < 0.5
        peak = torch.where(likely, labels, (labels + 1) % vocab)
        out[:, :-1].scatter_(-1, peak.unsqueeze(-1), 2.0 * torch.log(torch.tensor(vocab)).item())


def trained(tokens: int, share: float, generator: torch.Generator) -> Tensor:
    """bool `[tokens]`, with `share` of them, at least one, in random places."""
    order = torch.randperm(tokens, generator=generator, device=DEVICE)
    return order < max(round(share * tokens), 1)


def implementations() -> list[str]:
    if DEVICE.type == "cpu":
        return ["cpu"]
    return ["triton", *(["cuda"] if build_info()["cuda_architectures"] else [])]


def compiled(function: Callable[..., Any], *arguments: Any) -> Call:
    torch.compiler.reset()  # or a shape too many makes the next one run without being compiled
    faster = torch.compile(function, dynamic=False)
    return lambda: faster(*arguments)


def gradient(forward: Call, leaf: Tensor) -> Call:
    """The gradient itself: accumulating it into a leaf copies it where the leaf is a view."""
    return lambda: torch.autograd.grad(forward(), leaf)[0]


def no_grad(call: Call) -> Call:
    return torch.no_grad()(call)


def log_prob_providers(batch: Batch, entropy: bool) -> list[Provider]:
    item, wide = batch.case.nbytes, 4 * batch.case.tokens * batch.case.vocab
    traffic = round(item * batch.mask.sum().item() / batch.case.tokens)
    function = eager.log_probs_and_entropy if entropy else eager.log_probs
    arguments = (batch.logits, batch.labels)

    def ours(impl: str) -> Callable[[], Call]:
        def call() -> Any:
            out = token_log_probs(
                batch.logits, batch.masked_labels, return_entropy=entropy, impl=impl
            )
            return (out.log_probs, out.entropy) if entropy else out.log_probs

        return lambda: no_grad(call)

    providers = [Provider(f"ours {i}", "ours", ours(i), 0) for i in implementations()]
    providers += [
        Provider("eager", "eager", lambda: no_grad(lambda: function(*arguments)), wide),
        Provider(
            "torch.compile", "torch.compile", lambda: no_grad(compiled(function, *arguments)), 0
        ),
        *peers.log_prob_peers(batch, entropy),
        copy_provider(batch),
    ]
    for provider in providers[:-1]:
        provider.traffic = traffic
    return providers


def grpo_providers(batch: Batch) -> list[Provider]:
    item, wide = batch.case.nbytes, 4 * batch.case.tokens * batch.case.vocab
    # trained rows are read, and every row's gradient is written
    traffic = round(item * (1 + batch.mask.sum().item() / batch.case.tokens))
    arguments = (batch.logits, *batch.tokens)
    objective = Objective(beta=eager.BETA)

    def ours(impl: str, inplace: bool) -> Callable[[], Call]:
        def call() -> Tensor:
            return grpo_loss(
                batch.logits,
                batch.labels,
                batch.advantages,
                old_log_probs=batch.old,
                ref_log_probs=batch.ref,
                loss_mask=batch.mask,
                objective=objective,
                inplace=inplace,
                impl=impl,
            ).loss

        return lambda: gradient(call, batch.logits)

    providers = [
        Provider(f"ours {impl} inplace", "ours", ours(impl, True)) for impl in implementations()
    ]
    providers += [
        Provider(f"ours {impl}", "ours", ours(impl, False), item) for impl in implementations()
    ]
    providers += [
        Provider(
            "eager",
            "eager",
            lambda: gradient(lambda: eager.loss(*arguments), batch.logits),
            3 * wide,
        ),
        Provider(
            "torch.compile",
            "torch.compile",
            lambda: gradient(compiled(eager.loss, *arguments), batch.logits),
            item,
        ),
        *peers.grpo_peers(batch),
        copy_provider(batch),
    ]
    for provider in providers[:-1]:
        provider.traffic = traffic
    return providers


def copy_provider(batch: Batch) -> Provider:
    """One read and one write of the logits, into memory that is already there."""
    return Provider(
        "copy",
        "floor",
        lambda: lambda: batch.storage.copy_(batch.original),
        traffic=2 * batch.original.nbytes,
        checked=False,
    )


def row_measurement(op: str, batch: Batch) -> tuple[Case, list[Provider]]:
    case = batch.case
    whole = op == "grpo_loss"
    providers = grpo_providers(batch) if whole else log_prob_providers(batch, "entropy" in op)
    error = batch.gradient_error if whole else batch.log_probs_error
    # a gradient is as good as its dtype
    tolerance = 1e-2 if whole and case.dtype == "bfloat16" else 1e-4
    record = {
        "op": op,
        "shape": case.shape,
        "tokens": case.tokens,
        "vocab": case.vocab,
        "dtype": case.dtype,
        "share": case.share,
        "variant": case.variant,
        "logits_bytes": case.nbytes,
    }
    return Case(batch.restore, error, tolerance, record), providers
