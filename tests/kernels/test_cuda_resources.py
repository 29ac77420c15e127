"""What the CUDA compiler says of the row kernels: no spills, no stack, no warnings.

Needs nvcc and no GPU; `pytest -s` shows registers and shared memory.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
KERNEL = re.compile(r"\d([a-z_]+_kernel)I(6__half|13__nv_bfloat16|f)Lb([01])E")


class Resources(NamedTuple):
    kernel: str
    architecture: str
    stack: int
    spills: int
    registers: int
    shared: int


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`(the compiler's messages, resources of each kernel)`, for each source."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH to compile the CUDA kernels with")
    directory = tmp_path_factory.mktemp("cuda")
    results = {}
    for source in ("grpo_loss", "token_log_probs"):
        command = ["nvcc", "-c", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "--threads=2"]
        command += ["-Xcompiler=-Wall,-Wextra", "--extended-lambda", "-Xptxas=-v"]
        command += ['-DREGRPO_CUDA_ARCHITECTURES="80 90a"', "-o", str(directory / f"{source}.o")]
        for a in ARCHITECTURES:
            command += ["-gencode", f"arch=compute_{a},code=sm_{a}"]
        command.append(str(ROOT / "csrc" / "cuda" / f"{source}.cu"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        results[source] = done.stderr, [resources_of(m) for m in REPORT.finditer(done.stderr)]
    return results


def resources_of(report: re.Match) -> Resources:
    kernel = KERNEL.search(report["name"])
    assert kernel, report["name"]
    dtype = {"f": "fp32", "6__half": "fp16"}.get(kernel[2], "bf16")
    shared = re.search(r"(\d+) bytes smem", report["rest"])
    return Resources(
        f"{kernel[1]} {dtype}{' softcap' if kernel[3] == '1' else ''}",
        report["architecture"],
        int(report["stack"]),
        int(report["stores"]) + int(report["loads"]),
        int(report["registers"]),
        int(shared[1]) if shared else 0,
    )


@pytest.mark.parametrize(("source", "count"), [("grpo_loss", 2), ("token_log_probs", 3)])
def test_no_spills_no_stack_no_warnings(compiled, source, count):
    messages, kernels = compiled[source]
    # three dtypes, with and without softcap
    assert len(kernels) == count * 3 * 2 * len(ARCHITECTURES)
    for k in sorted(kernels):
        print(f"sm_{k.architecture:3} {k.kernel:42} {k.registers:3} registers, {k.shared} B shared")
    assert [k for k in kernels if k.spills or k.stack] == []
    assert [line for line in messages.splitlines() if "warning" in line.lower()] == []
