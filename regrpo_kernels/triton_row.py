"""Passes over one vocabulary row in Triton, shared by the row kernels: one program a row, a loop
over blocks of the row.

Lengths are never compile-time constants: a new T, B or L compiles nothing. The second pass over a
row runs backwards, so that it starts with what the first one left in cache. No atomics: two runs
give the same bits.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regrpo_kernels._library import rows, triton_interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e4)  # for y, where 2^y is 0: keeps 0 * -inf out of the entropy
INFINITY = tl.constexpr(math.inf)
IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def _cap(x, softcap, CAP: tl.constexpr):
    """Softcap c tanh(x / c), from one exponential of a non-positive number."""
    if CAP:
        t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / softcap))
        magnitude = softcap * (1.0 - t) / (1.0 + t)
        x = tl.where(x < 0, -magnitude, magnitude)
    return x


@triton.jit
def row_values(
    x_ptr, label, vocab, inv_temperature, softcap, CAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """First pass: `(maximum, sum, log_prob, lse, entropy)` of a row."""
    scale = inv_temperature * LOG2E
    z_label = _cap(tl.load(x_ptr + label).to(tl.float32), softcap, CAP)
    maximum = -INFINITY
    # A sum a lane, reduced once at the end: only the maximum is exchanged in each block.
    totals = tl.zeros([BLOCK_V], tl.float32)
    moments = tl.zeros([BLOCK_V], tl.float32)  # of e * y, e = 2^y
    for start in range(0, vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + cols, mask=cols < vocab, other=-INFINITY).to(tl.float32)
        z = tl.where(cols < vocab, _cap(x, softcap, CAP), -INFINITY)
        highest = tl.max(z, axis=0)
        if highest > maximum:
            shift = tl.where(maximum == -INFINITY, 0.0, (maximum - highest) * scale)
            shift = tl.maximum(shift, FLOOR)
            shrink = tl.exp2(shift)
            moments = shrink * (moments + shift * totals)
            totals = shrink * totals
            maximum = highest
        y = (z - tl.where(maximum == -INFINITY, 0.0, maximum)) * scale
        y = tl.where(y < FLOOR, FLOOR, y)  # NaN goes through
        e = tl.exp2(y)
        moments += e * y
        totals += e
    total = tl.sum(totals, axis=0)
    log_sum = tl.log(total)
    log_prob = tl.minimum((z_label - maximum) * inv_temperature - log_sum, 0.0)
    lse = maximum * inv_temperature + log_sum
    entropy = tl.maximum(log_sum - LN2 * tl.sum(moments, axis=0) / total, 0.0)
    return maximum, total, log_prob, lse, entropy


@triton.jit
def write_gradient(
    x_ptr,
    d_ptr,
    label,
    vocab,
    inv_temperature,
    softcap,
    reference,
    total,
    entropy,
    g,
    k,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Second pass: the gradient of `g log_prob - k entropy`, g and k over the temperature, where
    `total` belongs to `reference`: `2^y (b + a y)`, plus `g` for the label.
    """
    a = k * LN2 / total
    b = (k * (entropy - tl.log(total)) - g) / total
    blocks = tl.cdiv(vocab, BLOCK_V)
    for i in range(0, blocks):
        cols = (blocks - 1 - i) * BLOCK_V + tl.arange(0, BLOCK_V)
        live = cols < vocab
        z = _cap(tl.load(x_ptr + cols, mask=live, other=0.0).to(tl.float32), softcap, CAP)
        y = (z - reference) * (inv_temperature * LOG2E)
        y = tl.where(y < FLOOR, FLOOR, y)
        e = tl.exp2(y)
        v = e * (b + a * y) if ENTROPY else e * b
        v = tl.where(cols == label, v + g, v)
        if CAP:
            v = v * (1.0 - (z / softcap) * (z / softcap))
        tl.store(d_ptr + cols, v.to(d_ptr.dtype.element_ty), mask=live)


@triton.jit
def write_zeros(d_ptr, vocab, BLOCK_V: tl.constexpr):
    for start in range(0, vocab, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        zeros = tl.zeros([BLOCK_V], dtype=d_ptr.dtype.element_ty)
        tl.store(d_ptr + cols, zeros, mask=cols < vocab)


# --- launching ------------------------------------------------------------------------------------

# BLOCK_V elements at a time; what is fastest depends on the GPU, the dtype and the flags.
_CONFIGS = [
    triton.Config({"BLOCK_V": block}, num_warps=warps)
    for block, warps in ((2048, 4), (4096, 8), (8192, 16), (16384, 16))
]
_LENGTHS = ["num_rows", "inner", "x_stride_outer", "d_stride_outer"]
_tuned: set[tuple[Any, ...]] = set()


def row_kernel(*flags: str) -> Any:
    """Decorates a row kernel: tuned once for each vocabulary size, dtype and these flags, never for
    a length; Triton keeps the choice on disk.
    """

    def decorate(function: Any) -> Any:
        # of values a row each: the alignment of a part or of the second half follows a length
        per_row = [
            name
            for name in inspect.signature(function).parameters
            if name.endswith("_ptr") and name not in ("x_ptr", "d_ptr")
        ]
        jitted = triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=per_row)(
            function
        )
        key = ["vocab", "FEW_ROWS", *flags]
        return triton.autotune(configs=_CONFIGS, key=key, cache_results=True)(jitted)

    return decorate


def row_arguments(logits: Tensor, dlogits: Tensor | None) -> dict[str, Any]:
    """What every row kernel takes: the rows of the logits and of the gradient, if there is one."""
    names = ("inner", "x_stride_outer", "x_stride_inner")
    arguments = {"x_ptr": logits, "vocab": logits.shape[-1]}
    arguments |= dict(zip(names, rows(logits)[1:], strict=True))
    if dlogits is not None:
        _, _, outer, inner = rows(dlogits)
        arguments |= {"d_ptr": dlogits, "d_stride_outer": outer, "d_stride_inner": inner}
    return arguments


def launch_rows(kernel: Any, num_rows: int, arguments: dict[str, Any], **flags: Any) -> None:
    """One program a row."""
    # With fewer rows than multiprocessors a row is short of warps, not of neighbours.
    arguments = arguments | flags | {"FEW_ROWS": num_rows < 128}
    if triton_interpreted():  # nothing to time
        kernel.fn[(num_rows,)](**arguments, BLOCK_V=4096)
        return
    key = (kernel, arguments["x_ptr"].dtype, *[arguments[name] for name in kernel.keys])
    if key not in _tuned:
        _tune(kernel, min(num_rows, 512), arguments)
        _tuned.add(key)
    kernel[(num_rows,)](**arguments)


def _tune(kernel: Any, num_rows: int, arguments: dict[str, Any]) -> None:
    """Lets Triton time its configurations on a scratch gradient and with every row trained: they
    run many times, the gradient may overwrite its logits, and the first rows may all be masked.
    """
    logits, vocab = arguments["x_ptr"], arguments["vocab"]
    trial = arguments | {
        "labels_ptr": torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    }
    if "mask_ptr" in arguments:
        trial["mask_ptr"] = torch.ones(num_rows, dtype=torch.uint8, device=logits.device)
    if "d_ptr" in arguments:
        trial["d_ptr"] = torch.empty(num_rows, vocab, dtype=logits.dtype, device=logits.device)
        trial |= {"d_stride_outer": arguments["inner"] * vocab, "d_stride_inner": vocab}
    kernel[(num_rows,)](**trial)
