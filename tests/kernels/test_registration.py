"""torch.library contracts, torch.compile, lowering without a GPU, and what the module brings
along.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from regrpo_kernels import Objective, build_info, force_isa, grpo_loss, token_log_probs

T, V = 5, 63
OPS = torch.ops.regrpo_kernels


def rows(requires_grad):
    labels = torch.randint(0, V, (T,))
    labels[1] = -100
    return torch.randn(T, V, requires_grad=requires_grad), labels


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_opcheck_token_log_probs(impl, return_entropy):
    opcheck(OPS.token_log_probs.default, (*rows(True), 1.0, 0.0, return_entropy, impl))
    extra = [torch.rand(2, T) + 5, torch.rand(T), torch.randn(T), torch.randn(T)]
    opcheck(OPS.token_log_probs_backward.default, (*rows(False), *extra, 1.0, 0.0, impl))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_opcheck_grpo_loss(impl):
    mask = torch.tensor([1, 0, 1, 1, 0]).bool()
    tokens = [mask, torch.rand(T), torch.randn(T), -torch.rand(T), None]
    objective = ["clip", "k3", [0.2, 0.2, 0.0, 0.1, 0.0, 1.0, 1.05, 1.0, 0.0]]
    for ratio_bounds in (None, torch.tensor([0, 2, T])):
        inputs = [*tokens, ratio_bounds, *objective]
        for needs_gradient in (True, False):
            arguments = (*rows(needs_gradient), *inputs, needs_gradient, False, impl)
            opcheck(OPS.grpo_loss.default, arguments)
        opcheck(OPS.grpo_loss_.default, (*rows(False), *inputs, impl))
    opcheck(OPS.scale_gradient_.default, (rows(False)[0], torch.tensor(2.0), impl))


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_compiled_loss_equals_eager_and_a_new_length_compiles_nothing(inplace):
    objective = Objective(beta=0.1, loss_agg_mode="seq-mean-token-mean")

    def loss_of(hidden, weight, labels, advantages, cu_seqlens, old):
        out = grpo_loss(
            hidden @ weight,
            labels,
            advantages,
            old_log_probs=old,
            ref_log_probs=old,
            cu_seqlens=cu_seqlens,
            objective=objective,
            inplace=inplace,
        )
        return out.loss, out.log_probs, out.metrics["entropy"]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens in (6, 9, 14, 5):
        weight = torch.randn(8, V)
        arguments = [
            torch.randn(tokens, 8),
            torch.randint(0, V, (tokens,)),
            torch.randn(2),
            torch.tensor([0, 2, tokens], dtype=torch.int32),
            -torch.rand(tokens) * 4,
        ]
        results = []
        for function in (loss_of, compiled):
            w = weight.clone().requires_grad_()
            values = function(arguments[0], w, *arguments[1:])
            (2 * values[0]).backward()
            results.append([*(v.detach() for v in values), w.grad])
        torch.testing.assert_close(*results)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert set(frames) == {frames[0]}


def test_compiled_log_probs_equal_eager():
    def total(logits, labels):
        out = token_log_probs(logits, labels, return_entropy=True)
        return out.log_probs.sum() + 0.3 * out.entropy.sum()

    torch._dynamo.reset()
    logits, labels = rows(True)
    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        logits.grad = None
        function(logits, labels).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """A second one in the process would fight torch's over the cores."""
    token_log_probs(*rows(False))
    lines = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line}) <= 1


def test_build_info():
    info = build_info()
    assert info["cpu_isa"] in info["cpu_isas_usable"]
    assert set(info["cpu_isas_usable"]) <= set(info["cpu_isas_compiled"])
    assert info["implementation"]["cpu"] == "cpu"
    printed = subprocess.run(
        [sys.executable, "-m", "regrpo_kernels"], capture_output=True, text=True, check=True
    ).stdout
    for name in info:
        assert name in printed


def test_unknown_isa():
    with pytest.raises(ValueError, match="isa must be one of"), force_isa("sse9"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="only under its interpreter"):
        token_log_probs(*rows(False), impl="triton")
