"""What every op file shares: the torch.library fragment, the compiled module, and the choice of
implementation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

try:  # after torch, whose OpenMP runtime the module uses
    from regrpo_kernels import _C
except ImportError as error:
    raise ImportError(
        "regrpo_kernels._C is not built or was built for another Python; install the package with "
        f"`pip install -e .` from the repository root ({error})"
    ) from error

library: torch.library.Library = torch.library.Library("regrpo_kernels", "DEF")

HAS_TRITON = importlib.util.find_spec("triton") is not None
CUDA_ARCHITECTURES: str = _C.build_info()["cuda_architectures"]
IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")
IGNORE_INDEX = -100

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiled() -> ModuleType:
    """The compiled module: functions that take data pointers, sizes and strides."""
    return _C


def triton_interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors (TRITON_INTERPRET=1 when triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose_impl(impl: str | None, device: torch.device) -> str:
    """The implementation that serves `device`: the one asked for, or the best one present.

    Raises:
        ValueError: `impl` is unknown or does not run on `device`.
        RuntimeError: `impl` is not there; the message says why and what to install.
    """
    if impl is None:
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda":
            if HAS_TRITON:
                return "triton"
            if CUDA_ARCHITECTURES:
                return "cuda"
            raise RuntimeError(
                "no GPU implementation is present: install triton, or nvcc and reinstall "
                "regrpo_kernels, or ask for impl='reference'"
            )
        return "reference"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"impl='cpu' needs CPU tensors, got tensors on {device}")
    if impl == "triton":
        if not HAS_TRITON:
            raise RuntimeError("impl='triton' needs triton: `pip install triton` (Linux)")
        if device.type == "cpu" and not triton_interpreted():
            raise RuntimeError(
                "impl='triton' runs on CPU tensors only under its interpreter: set "
                "TRITON_INTERPRET=1 before importing triton, or use impl='cpu'"
            )
    if impl == "cuda":
        if not CUDA_ARCHITECTURES:
            raise RuntimeError(
                "impl='cuda' was not compiled: install the CUDA toolkit (nvcc on PATH, or CUDACXX "
                "set) and run `pip install -e .` again, or use impl='triton'"
            )
        if device.type != "cuda":
            raise ValueError(f"impl='cuda' needs CUDA tensors, got tensors on {device}")
    return impl


def pointer(tensor: Tensor | None) -> int:
    """Data pointer for the compiled module; 0 is null."""
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor: Tensor) -> tuple[int, int, int, int]:
    """`(pointer, inner, outer stride, inner stride)` of the rows of a `[T, V]` or `[B, L, V]`
    tensor.
    """
    if tensor.dim() == 2:
        return tensor.data_ptr(), max(tensor.shape[0], 1), 0, tensor.stride(0)
    return tensor.data_ptr(), max(tensor.shape[1], 1), tensor.stride(0), tensor.stride(1)


_isa = "auto"


@contextmanager
def force_isa(isa: str) -> Iterator[None]:
    """Runs the CPU kernels of a `with` block on another instruction set; for tests and benchmarks.

    Args:
        isa: one of `build_info()["cpu_isas_usable"]`.

    Raises:
        ValueError: this processor, or this build, does not have it.
    """
    global _isa
    usable = _C.build_info()["cpu_isas_usable"]
    if isa not in usable:
        raise ValueError(f"isa must be one of {usable}, got {isa!r}")
    previous, _isa = _isa, isa
    try:
        yield
    finally:
        _isa = previous


def launch(tensor: Tensor) -> dict[str, Any]:
    """Where a compiled kernel runs: the stream of a CUDA tensor, or threads and instruction set on
    CPU.
    """
    if tensor.device.type == "cuda":
        return {"stream": torch.cuda.current_stream(tensor.device).cuda_stream}
    return {"stream": None, "num_threads": torch.get_num_threads(), "isa": _isa}


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's CUDA device current."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


# --- argument checks ------------------------------------------------------------------------------


def check_logits(logits: Tensor, labels: Tensor, reference: bool = False) -> None:
    """Shapes, dtypes and devices of logits `[T, V]` or `[B, L, V]` and labels `[T]` or `[B, L]`."""
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(
            "logits must have shape [T, V] (packed) or [B, L, V] (padded) with V > 0, "
            f"got {list(logits.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must have dtype torch.int64, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {list(logits.shape[:-1])} to match logits "
            f"{list(logits.shape)}, got {list(labels.shape)}"
        )
    check_device("labels", labels, logits)
    if logits.dtype not in DTYPE_CODES and not (reference and logits.dtype == torch.float64):
        raise TypeError(
            f"logits must have one of the dtypes {list(DTYPE_CODES)}, got {logits.dtype}"
        )
    if not reference and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            "logits must be contiguous in the vocabulary dimension, got strides "
            f"{logits.stride()} for shape {list(logits.shape)}; call .contiguous() first"
        )


def check_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(
            f"{name} must be on {logits.device} like logits, got a tensor on {tensor.device}"
        )
