"""Log-probabilities of the label tokens: one pass over each logits row, differentiable.

    z = logits / temperature,   log_prob_t = z_t[label_t] - logsumexp(z_t),
    entropy_t = -sum_v p_tv log p_tv

A plain log-softmax writes a second `[T, V]` tensor in fp32 to read one element of each row. Here a
row is read once and three numbers come out; the gradient is one more read and one write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regrpo_kernels._library import (
    DTYPE_CODES,
    IGNORE_INDEX,
    check_logits,
    choose_impl,
    compiled,
    device_guard,
    launch,
    library,
    pointer,
    rows,
)


class TokenLogProbs(NamedTuple):
    """Of every row; fp32, shaped like the labels, zero where the label is -100.

    Attributes:
        log_probs: of the labels, differentiable.
        lse: log of the sum of the exponentials of the scaled logits; carries no gradient.
        entropy: in nats, differentiable; None if it was not asked for.
    """

    log_probs: Tensor
    lse: Tensor
    entropy: Tensor | None


def scaled_logits(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """What the softmax sees, in fp32 (fp64 for fp64 logits)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_log_probs_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> TokenLogProbs:
    """The readable specification, in plain torch; any device, fp64 included."""
    kept = labels != IGNORE_INDEX
    # a skipped row may hold anything, NaN included
    z = scaled_logits(torch.where(kept.unsqueeze(-1), logits, 0.0), temperature, softcap)
    log_p = torch.log_softmax(z, dim=-1)
    index = labels.masked_fill(~kept, 0).unsqueeze(-1)
    log_probs = log_p.gather(-1, index).squeeze(-1)
    lse = torch.logsumexp(z.detach(), dim=-1)
    entropy = None
    if return_entropy:
        finite = log_p.masked_fill(log_p == -torch.inf, 0.0)  # probability 0 adds nothing
        entropy = -(log_p.exp() * finite).sum(-1).masked_fill(~kept, 0.0)
    return TokenLogProbs(log_probs.masked_fill(~kept, 0.0), lse.masked_fill(~kept, 0.0), entropy)


# row_sums [2, *labels.shape], for backward: a reference at or near the row's largest z (the logit
# after the softcap), and the sum of exp((z - reference) / temperature). From lse in fp32 the
# probabilities would be off by half a step of it, relative: 5e-4 at logits of 1e4.
library.define(
    "token_log_probs(Tensor logits, Tensor labels, float temperature, float softcap, "
    "bool return_entropy, str impl) "
    "-> (Tensor log_probs, Tensor lse, Tensor entropy, Tensor row_sums)"
)
library.define(
    "token_log_probs_backward(Tensor logits, Tensor labels, Tensor row_sums, Tensor entropy, "
    "Tensor dlog_probs, Tensor? dentropy, float temperature, float softcap, str impl) -> Tensor"
)


def empty_outputs(labels: Tensor, return_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_probs = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    entropy = torch.empty_like(log_probs) if return_entropy else log_probs.new_empty(0)
    return log_probs, torch.empty_like(log_probs), entropy, log_probs.new_empty(2, *labels.shape)


def forward_rows(
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    row_sums: Tensor,
    temperature: float,
    softcap: float,
    impl: str,
) -> None:
    """Fills `log_probs`, `lse`, `entropy` and both of `row_sums`, contiguous and shaped like the
    contiguous labels.
    """
    with device_guard(logits):
        if impl == "triton":
            from regrpo_kernels import triton_token_log_probs

            triton_token_log_probs.token_log_probs(
                logits, labels, log_probs, lse, entropy, row_sums, temperature, softcap
            )
            return
        compiled().token_log_probs(
            dtype=DTYPE_CODES[logits.dtype],
            logits=rows(logits),
            rows=labels.numel(),
            vocab=logits.shape[-1],
            labels=pointer(labels),
            temperature=temperature,
            softcap=softcap,
            log_probs=pointer(log_probs),
            lse=pointer(lse),
            entropy=pointer(entropy),
            reference=pointer(row_sums[0]),
            sum=pointer(row_sums[1]),
            **launch(logits),
        )


def _forward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float,
    return_entropy: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = labels.contiguous()
    log_probs, lse, entropy, row_sums = outputs = empty_outputs(labels, return_entropy)
    wanted = entropy if return_entropy else None
    forward_rows(logits, labels, log_probs, lse, wanted, row_sums, temperature, softcap, impl)
    return outputs


def _backward(
    logits: Tensor,
    labels: Tensor,
    row_sums: Tensor,
    entropy: Tensor,
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    temperature: float,
    softcap: float,
    impl: str,
) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    gradient_rows(
        logits, labels, row_sums, entropy, dlog_probs, dentropy, dlogits, temperature, softcap, impl
    )
    return dlogits


def gradient_rows(
    logits: Tensor,
    labels: Tensor,
    row_sums: Tensor,
    entropy: Tensor,
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    dlogits: Tensor,
    temperature: float,
    softcap: float,
    impl: str,
) -> None:
    """Fills `dlogits`, which may be `logits` itself."""
    labels, dlog_probs = labels.contiguous(), dlog_probs.contiguous()
    dentropy = None if dentropy is None else dentropy.contiguous()
    with device_guard(logits):
        if impl == "triton":
            from regrpo_kernels import triton_token_log_probs

            triton_token_log_probs.token_log_probs_backward(
                logits,
                labels,
                row_sums,
                entropy,
                dlog_probs,
                dentropy,
                dlogits,
                temperature,
                softcap,
            )
            return
        compiled().token_log_probs_backward(
            dtype=DTYPE_CODES[logits.dtype],
            logits=rows(logits),
            rows=labels.numel(),
            vocab=logits.shape[-1],
            labels=pointer(labels),
            temperature=temperature,
            softcap=softcap,
            reference=pointer(row_sums[0]),
            sum=pointer(row_sums[1]),
            entropy=0 if dentropy is None else pointer(entropy),
            dlog_probs=pointer(dlog_probs),
            dentropy=pointer(dentropy),
            dlogits=rows(dlogits),
            **launch(logits),
        )


for _device in ("CPU", "CUDA"):
    library.impl("token_log_probs", _forward, _device)
    library.impl("token_log_probs_backward", _backward, _device)


@torch.library.register_fake("regrpo_kernels::token_log_probs", lib=library)
def _(logits, labels, temperature, softcap, return_entropy, impl):
    return empty_outputs(labels, return_entropy)


@torch.library.register_fake("regrpo_kernels::token_log_probs_backward", lib=library)
def _(logits, labels, row_sums, entropy, dlog_probs, dentropy, temperature, softcap, impl):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, labels, ctx.temperature, ctx.softcap, ctx.return_entropy, ctx.impl = inputs
    _, lse, entropy, row_sums = output
    ctx.save_for_backward(logits, labels, row_sums, entropy)
    ctx.mark_non_differentiable(lse, row_sums)


def _autograd_backward(ctx, dlog_probs, dlse, dentropy, drow_sums):
    dlogits = torch.ops.regrpo_kernels.token_log_probs_backward(
        *ctx.saved_tensors,
        dlog_probs,
        dentropy if ctx.return_entropy else None,
        ctx.temperature,
        ctx.softcap,
        ctx.impl,
    )
    return dlogits, None, None, None, None, None


torch.library.register_autograd(
    "regrpo_kernels::token_log_probs",
    _autograd_backward,
    setup_context=_setup_context,
    lib=library,
)


def check_scaling(temperature: float, softcap: float | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or greater than 0, got {softcap!r}")


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str | None = None,
) -> TokenLogProbs:
    """Log-probabilities of `labels` under `softmax(logits / temperature)`, differentiable.

    Args:
        logits: `[T, V]` or `[B, L, V]`, fp32, bf16 or fp16; any strides with a contiguous last
            dimension, so views such as `logits[:, :-1]` are not copied.
        labels: int64, shaped like `logits` without the vocabulary; -100 skips the row, which is
            never read.
        temperature: logits are divided by it.
        softcap: logits become `softcap * tanh(logits / softcap)` before the temperature (Gemma 2).
        return_entropy: also return the entropy of every row, in nats.
        impl: None (the best present), "reference", "cpu", "triton" or "cuda".

    Returns:
        `TokenLogProbs(log_probs, lse, entropy)`, fp32, shaped like labels, zero in skipped rows.
        Gradients flow through `log_probs` and `entropy`; `lse` has none.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or option; a label out of range (CPU only,
            where the check costs no synchronisation).
    """
    chosen = choose_impl(impl, logits.device)
    check_logits(logits, labels, reference=chosen == "reference")
    check_scaling(temperature, softcap)
    if chosen == "reference":
        return token_log_probs_reference(
            logits, labels, temperature=temperature, softcap=softcap, return_entropy=return_entropy
        )
    log_probs, lse, entropy, _ = torch.ops.regrpo_kernels.token_log_probs(
        logits, labels, temperature, softcap or 0.0, return_entropy, chosen
    )
    return TokenLogProbs(log_probs, lse, entropy if return_entropy else None)
