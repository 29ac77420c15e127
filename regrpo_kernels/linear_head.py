"""The language-model head in chunks of rows: what the linear ops share.

`[T, V]` logits are never held. Rows that are not trained are left out before the first matmul; the
rest go through one reused buffer of `CHUNK_BYTES`, in which a row kernel turns logits into their
gradient, and two more matmuls take that to the hidden states and to the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from regrpo_kernels._library import DTYPE_CODES, check_device, check_logits

# A matmul wants hundreds of rows; a CPU's caches want few.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
_SLICE = 4096


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reference: bool
) -> None:
    """Shapes, dtypes and devices of hidden `[T, H]` or `[B, L, H]`, weight `[V, H]`, bias `[V]`."""
    if hidden.dim() not in (2, 3):
        raise ValueError(
            "hidden must have shape [T, H] (packed) or [B, L, H] (padded), "
            f"got {list(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [V, {hidden.shape[-1]}] with V > 0 to match hidden "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}")
        check_device(name, tensor, hidden)
    check_logits(
        hidden.new_empty(()).expand(*hidden.shape[:-1], weight.shape[0]), labels, reference=True
    )
    if hidden.dtype not in DTYPE_CODES and not (reference and hidden.dtype == torch.float64):
        raise TypeError(
            f"hidden must have one of the dtypes {list(DTYPE_CODES)}, got {hidden.dtype}"
        )


class LinearHead:
    """`hidden @ weight.T + bias` over the selected rows, and the gradients through it."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selected: Tensor,
        needs: list[bool],
    ):
        """Args: selected: int64 rows of the flattened hidden; needs: of hidden, weight, bias."""
        self.shape, self.selected = hidden.shape, selected
        self.hidden = hidden.flatten(0, -2).index_select(0, selected)
        self.weight, self.bias = weight, bias
        self.dhidden = torch.empty_like(self.hidden) if needs[0] else None
        budget = CHUNK_BYTES[hidden.device.type]
        if needs[1] and hidden.is_cuda:
            # every chunk reads and writes the whole fp32 gradient of the weight, so chunks as large
            budget = max(budget, 4 * weight.numel())
        rows = budget // (weight.shape[0] * weight.element_size())
        self.chunk = min(max(rows, 1), max(len(selected), 1))
        self.buffer = hidden.new_empty(self.chunk, weight.shape[0])
        # the sum of several products is kept in fp32; one alone is rounded by its matmul
        sum_dtype = torch.float32 if len(selected) > self.chunk else weight.dtype
        self.dweight = torch.empty_like(weight, dtype=sum_dtype) if needs[1] else None
        self.has_product = False
        self.dbias = (
            torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
        )

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits); the logits may be overwritten by their gradient."""
        for start in range(0, len(self.hidden), self.chunk):
            rows = slice(start, min(start + self.chunk, len(self.hidden)))
            logits = self.buffer[: rows.stop - start]
            torch.mm(self.hidden[rows], self.weight.T, out=logits)
            if self.bias is not None:
                logits += self.bias
            yield rows, logits

    def narrowed(self, index: Tensor) -> LinearHead:
        """The same head over some of its rows, in the same buffers; no gradient was added yet."""
        head = copy.copy(self)
        head.selected = self.selected.index_select(0, index)
        head.hidden = self.hidden.index_select(0, index)
        if self.dhidden is not None:
            head.dhidden = self.dhidden[: len(index)]
        return head

    def add_gradient(self, rows: slice, dlogits: Tensor, kept: Tensor | None = None) -> None:
        """Takes the gradient of a chunk's logits further. `kept`: bool, the rows that have any; the
        others are left out of the matmuls.
        """
        hidden, index = self.hidden[rows], None
        if kept is not None:
            index = kept.nonzero().squeeze(1)
            if len(index) < len(kept):
                dlogits, hidden = dlogits.index_select(0, index), hidden.index_select(0, index)
            else:
                index = None
        if self.dhidden is not None:
            if index is None:
                torch.mm(dlogits, self.weight, out=self.dhidden[rows])
            else:
                self.dhidden[rows] = 0.0
                self.dhidden[rows].index_copy_(0, index, dlogits @ self.weight)
        if self.dweight is not None and len(hidden) > 0:
            _add_product(self.dweight, dlogits.T, hidden, self.has_product)
            self.has_product = True
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=torch.float32)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias, in their dtypes; empty where not asked for."""
        dhidden = self.hidden.new_empty(0)
        if self.dhidden is not None:
            whole = self.dhidden.new_zeros(self.shape.numel() // self.shape[-1], self.shape[-1])
            dhidden = whole.index_copy_(0, self.selected, self.dhidden).view(self.shape)
        if self.dweight is not None and not self.has_product:
            self.dweight.zero_()
        dweight, dbias = (
            self.hidden.new_empty(0) if d is None else d.to(self.weight.dtype)
            for d in (self.dweight, self.dbias)
        )
        return dhidden, dweight, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """`total = a @ b`, `+=` where `add`; the total may be fp32 for 16-bit factors."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=float(add), out=total)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=float(add), out=total)
    else:  # the CPU's matmuls round their result to their factors' dtype; slices that stay in cache
        for part in range(0, len(a), _SLICE):
            product = a[part : part + _SLICE] @ b
            if add:
                total[part : part + _SLICE] += product
            else:
                total[part : part + _SLICE] = product


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of `LinearHead.gradients`."""
    like = (hidden, weight, bias)
    dhidden, dweight, dbias = (
        hidden.new_empty(x.shape if need and x is not None else (0,))
        for x, need in zip(like, needs, strict=True)
    )
    return dhidden, dweight, dbias


def gradient_needs(*tensors: Tensor | None) -> list[bool]:
    """Which of hidden, weight and bias autograd will ask the gradient of."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]
