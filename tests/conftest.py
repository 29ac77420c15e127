"""Runs Triton kernels on CPU tensors where there is no GPU, and poisons fresh buffers."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is first imported


@pytest.fixture
def poisoned_empty(monkeypatch):
    """`torch.empty` and its kin return NaN or the largest integer: unwritten outputs show."""

    def poisoned(create):
        def fill(*args, **kwargs):
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(
                True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
            )

        return fill

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
