"""One fixture for the implementations of the row ops, one for those of the advantage ops."""

from contextlib import nullcontext

import pytest
import torch
from implementations import IMPLEMENTATIONS

from regrpo_kernels import force_isa


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
