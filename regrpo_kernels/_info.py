"""What is compiled and which implementation serves which device."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from regrpo_kernels._library import HAS_TRITON, choose_impl, compiled, triton_interpreted


def build_info() -> dict[str, Any]:
    """Version, CPU instruction sets, CUDA architectures, Triton version, and the default
    implementations.
    """
    info = compiled().build_info()
    devices = {}
    for device in ("cpu", "cuda"):
        try:
            devices[device] = choose_impl(None, torch.device(device))
        except RuntimeError as error:
            devices[device] = f"none: {error}"
    return {
        "version": importlib.metadata.version("regrpo"),
        "compiler": info["compiler"],
        "cpu_isas_compiled": info["cpu_isas_compiled"],
        "cpu_isas_usable": info["cpu_isas_usable"],
        "cpu_isa": info["cpu_isa"],
        "cuda_architectures": info["cuda_architectures"] or None,
        "cuda_row_kernels": info["cuda_row_kernels"] or None,
        "cuda_device_present": torch.cuda.is_available(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if HAS_TRITON else None,
        "triton_interpreted": triton_interpreted(),
        "implementation": devices,
    }
