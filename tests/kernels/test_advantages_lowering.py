"""The Triton kernels of the advantage ops compile for GPUs, on a machine without one."""

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

from regrpo_kernels import triton_advantages as k

TYPES = {
    "rewards_ptr": "*fp32", "advantages_ptr": "*fp32", "success_ptr": "*fp32",
    "verifier_scores_ptr": "*fp32", "token_advantages_ptr": "*fp32", "group_ids_ptr": "*i64",
    "reflection_tokens_ptr": "*i64", "segment_ids_ptr": "*u8", "cu_seqlens_ptr": "*i32",
    "loss_mask_ptr": "*i1", "n_sequences": "i32", "group_size": "i32", "ddof": "i32",
}
RULE = {"BASELINE": "leave_one_out", "SCALE": "batch", "HAS_IDS": True, "BLOCK": 1024}
SEGMENTS = {"HAS_VERIFIER": True, "ACTION": 1, "REFLECTION": 3, "ROWS": 32, "COLUMNS": 128}
CONSTANTS = {
    k._group_advantages_kernel: RULE,
    k._reflection_advantages_kernel: {**RULE, **SEGMENTS},
}
for kernel, constants in CONSTANTS.items():
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "fp64") for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 8})
    assert f".target sm_{sys.argv[1]}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    print(kernel.fn.__name__)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_lowered_to_machine_code(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 2
