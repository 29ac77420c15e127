"""The implementations of the row ops: the reference, C++ for each instruction set, Triton, CUDA."""

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

from regrpo_kernels import build_info, force_isa


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


@pytest.fixture(
    params=[
        pytest.param(i, id=i.id, marks=pytest.mark.gpu if i.device == "cuda" else ())
        for i in IMPLEMENTATIONS
    ]
)
def implementation(request):
    """Every implementation of the row ops that this machine runs, one after the other."""
    with force_isa(request.param.isa) if request.param.isa else nullcontext():
        yield request.param


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(where, id="-".join(where), marks=pytest.mark.gpu if "cuda" in where else ())
        for where in dict.fromkeys((i.impl, i.device) for i in IMPLEMENTATIONS)
    ],
)
def where(request):
    """`(impl, device)` of the ops that have one C++ kernel for all instruction sets."""
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
