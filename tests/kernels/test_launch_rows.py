"""Tuning of the Triton row kernels: on scratch memory, once a vocabulary size, dtype and flags."""

import pytest
import torch

from regrpo_kernels import triton_row


class Recorder:
    """Stands where Triton's autotuned kernel is, which needs a GPU to run."""

    keys = ("vocab", "FEW_ROWS", "HAS_GRADIENT")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_row, "triton_interpreted", lambda: False)
    monkeypatch.setattr(triton_row, "_tuned", set())
    return Recorder()


def launch(kernel, logits, inplace=True):
    arguments = triton_row.row_arguments(logits, logits if inplace else torch.empty_like(logits))
    rows = logits.numel() // logits.shape[-1]
    arguments |= {
        "labels_ptr": torch.full((rows,), 3),
        "mask_ptr": torch.zeros(rows, dtype=torch.uint8),
    }
    triton_row.launch_rows(kernel, rows, arguments, HAS_GRADIENT=True)


def test_a_gradient_in_place_is_tuned_on_scratch_memory(kernel):
    padded = torch.randn(60, 11, 9)
    launch(kernel, padded[:, :-1])
    (tried, trial), (grid, real) = kernel.calls
    assert (tried, grid) == ((512,), (600,))
    assert real["d_ptr"].data_ptr() == padded.data_ptr()
    assert trial["d_ptr"].data_ptr() != padded.data_ptr()
    # row r of the gradient, r // inner and r % inner, lies at r * vocab
    assert (trial["inner"], trial["d_stride_outer"], trial["d_stride_inner"]) == (10, 90, 9)
    assert trial["d_ptr"].shape == (512, 9)
    # rows that would be skipped are not what is timed, and their labels may be -100
    assert trial["mask_ptr"].all()
    assert not real["mask_ptr"].any()
    assert (trial["labels_ptr"] == 0).all()


def test_tuned_once_for_any_length(kernel):
    for rows in (200, 300, 5000):
        launch(kernel, torch.empty(rows, 9))
    assert [grid for grid, _ in kernel.calls] == [(200,), (200,), (300,), (5000,)]
    launch(kernel, torch.empty(3, 9))  # few rows are tuned apart
    launch(kernel, torch.empty(200, 9, dtype=torch.bfloat16))
    launch(kernel, torch.empty(200, 10))
    assert len(kernel.calls) == 4 + 2 * 3
