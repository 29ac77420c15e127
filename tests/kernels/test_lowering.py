"""The Triton row kernels compile for GPUs, on a machine without one."""

import os
import subprocess
import sys

import pytest

# in a process of its own: under the interpreter, which the other tests use, nothing is compiled
SCRIPT = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regrpo_kernels import triton_grpo_loss, triton_objective, triton_token_log_probs

FLAGS = {
    "HAS_ENTROPY": True, "CAP": True, "POLICY": 0, "KL": 2, "HAS_OLD": True, "HAS_ADVANTAGES": True,
    "HAS_REF": True, "HAS_DELTA": True, "HAS_GRADIENT": True, "FEW_ROWS": False, "BLOCK": 1024,
}
TYPES = {
    "labels_ptr": "*i64", "mask_ptr": "*u8", "cu_seqlens_ptr": "*i64", "inner": "i64",
    "vocab": "i64", "num_rows": "i64", "num_tokens": "i64", "x_stride_outer": "i64",
    "x_stride_inner": "i64", "d_stride_outer": "i64", "d_stride_inner": "i64",
}


def lower(kernel, dtype, flags, options):
    signature, constants = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in flags:
            signature[name], constants[(index,)] = "constexpr", flags[name]
        elif name in ("x_ptr", "d_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = TYPES.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options=options)
    assert f".target sm_{sys.argv[1]}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    print(kernel.fn.__name__, dtype)


for tuned in (
    triton_token_log_probs._token_log_probs_fwd_kernel,
    triton_token_log_probs._token_log_probs_bwd_kernel,
    triton_grpo_loss._grpo_loss_fwd_kernel,
):
    for dtype, config in zip(("fp32", "bf16", "fp16", "bf16"), tuned.configs, strict=True):
        lower(tuned.fn, dtype, FLAGS | config.kwargs, {"num_warps": config.num_warps})
for dtype in ("fp32", "bf16", "fp16"):
    flags = {"BLOCK_V": 4096}
    lower(triton_grpo_loss._scale_gradient_kernel, dtype, flags, {"num_warps": 8})
lower(triton_objective._sequence_objective_kernel, "fp32", FLAGS, {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_lowered_to_machine_code(capability, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 3 * 4 + 3 + 1
