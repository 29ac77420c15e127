"""TRL's log-prob functions, and `patch_grpo_trainer`: a stock `GRPOTrainer` on our kernels.

For TRL 1.14 and later, whose trainers score hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrpo_kernels._library import IGNORE_INDEX
from regrpo_kernels.compat.scaled_head import ScaledHead
from regrpo_kernels.compat.trl_trainer import patch_grpo_trainer
from regrpo_kernels.token_log_probs import TokenLogProbs, token_log_probs

__all__ = [
    "chunked_log_probs",
    "entropy_from_logits",
    "patch_grpo_trainer",
    "selective_log_softmax",
]

_UNSUPPORTED_OUTPUTS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs of `index` under `softmax(logits / temperature)`, differentiable.

    Args:
        logits: `[..., V]`, fp32, bf16, fp16 or fp64 (which the plain torch reference computes).
        index: integers `[...]`, or `[..., K]` for K of each row; backward of K holds K gradients.
        row_mask: as index; zero skips the row, which is never read.

    Returns:
        Shaped like index, zero where masked; fp32 (fp64 for fp64), as from TRL's own GPU kernel.

    Raises:
        ValueError, TypeError: a bad shape, dtype, device or temperature.
    """
    several = index.dim() == logits.dim()
    if logits.dim() == 0 or index.shape[: logits.dim() - 1] != logits.shape[:-1]:
        raise ValueError(
            f"index must have shape {list(logits.shape[:-1])} or {[*logits.shape[:-1], 'K']} to "
            f"match logits {list(logits.shape)}, got {list(index.shape)}"
        )
    labels = index.long()
    if row_mask is not None:
        if row_mask.shape != index.shape:
            raise ValueError(
                f"row_mask must have the shape of index {list(index.shape)}, "
                f"got {list(row_mask.shape)}"
            )
        labels = labels.masked_fill(row_mask == 0, IGNORE_INDEX)
    if several:
        logits = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
    return _rows(logits, labels, temperature, entropy=False).log_probs.view(index.shape)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of each row of logits `[..., V]`, in nats, differentiable; fp32 (fp64 for fp64).

    `chunk_size` bounds TRL's intermediate tensors; here a row is read once and nothing of its size
    is made, so it only has to be valid.

    Raises:
        ValueError, TypeError: a bad shape, dtype or chunk size.
    """
    if not chunk_size > 0:
        raise ValueError(f"chunk_size must be greater than 0, got {chunk_size!r}")
    if logits.dim() == 0:
        raise ValueError("logits must have shape [..., V], got []")
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = _rows(logits, labels, 1.0, entropy=True).entropy
    assert entropy is not None
    return entropy.view(logits.shape[:-1])


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy",),
) -> tuple[Tensor, Tensor | None, None, None, None]:
    """Log-probs of `hidden @ weight.T + bias` without the logits: `ChunkedLogProbFunction.apply`.

    Args:
        hidden: `[N, H]`; weight `[V, H]`; bias `[V]`; computed in hidden's dtype, or autocast's.
        targets: `[N]`; -100 skips the row.
        chunk_size: as in `entropy_from_logits`; the chunks here are of rows.
        final_logit_softcapping, logit_scale: `c tanh(logit_scale * logits / c)`, as in Gemma.
        outputs: "entropy", or nothing; more of TRL's are not supported.

    Returns:
        `(log_probs [N], entropy [N] or None, None, None, None)`, fp32.

    Raises:
        ValueError, TypeError: an output that is not supported; a bad shape, dtype, device or value.
    """
    for name in outputs:
        if name in _UNSUPPORTED_OUTPUTS:
            raise ValueError(f"outputs: {name!r} is not supported, only 'entropy' is")
        if name not in ("entropy", "log_probs"):
            raise ValueError(f"outputs: {name!r} is not known")
    if not chunk_size > 0:
        raise ValueError(f"chunk_size must be greater than 0, got {chunk_size!r}")
    head = ScaledHead(temperature, final_logit_softcapping, logit_scale)
    found = head.log_probs(hidden, weight, bias, targets, entropy="entropy" in outputs)
    return found.log_probs, found.entropy, None, None, None


def _rows(logits: Tensor, labels: Tensor, temperature: float, entropy: bool) -> TokenLogProbs:
    if logits.dim() not in (2, 3):
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return token_log_probs(
        logits,
        labels,
        temperature=temperature,
        return_entropy=entropy,
        impl="reference" if logits.dtype == torch.float64 else None,
    )
