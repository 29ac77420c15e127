"""The implementations of the row ops: the reference, C++ for each instruction set, Triton, CUDA."""

from typing import NamedTuple

import torch

from regrpo_kernels import build_info


class Implementation(NamedTuple):
    impl: str
    device: str
    isa: str | None = None

    @property
    def id(self) -> str:
        return "-".join(part for part in self if part)


IMPLEMENTATIONS = [
    Implementation("reference", "cpu"),
    *[Implementation("cpu", "cpu", isa) for isa in build_info()["cpu_isas_usable"]],
    Implementation("triton", "cpu"),
]
if torch.cuda.is_available():
    IMPLEMENTATIONS[-1:] = [Implementation(impl, "cuda") for impl in ("reference", "triton")]
    if build_info()["cuda_architectures"]:
        IMPLEMENTATIONS.append(Implementation("cuda", "cuda"))
