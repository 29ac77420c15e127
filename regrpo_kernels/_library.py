"""What every op file shares: the torch.library fragment, the compiled module, and the choice of implementation."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

try:  # after torch, whose OpenMP runtime the module uses
    from regrpo_kernels import _C
except ImportError as error:
    raise ImportError(
        "regrpo_kernels._C is not built or was built for another Python; install the package with "
        f"`pip install -e .` from the repository root ({error})"
    ) from error

library = torch.library.Library("regrpo_kernels", "DEF")

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


def pointer(tensor: torch.Tensor | None) -> int:
    """Data pointer for the compiled module; 0 is null."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(tensor: torch.Tensor) -> int:
    """The current CUDA stream of the tensor's device, as the integer that the compiled module takes."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def rows(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """`(pointer, inner, outer stride, inner stride)` of the rows of a `[T, V]` or `[B, L, V]` tensor."""
    if tensor.dim() == 2:
        return tensor.data_ptr(), max(tensor.shape[0], 1), 0, tensor.stride(0)
    return tensor.data_ptr(), max(tensor.shape[1], 1), tensor.stride(0), tensor.stride(1)
