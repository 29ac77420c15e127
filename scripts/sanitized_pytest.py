"""Runs pytest on the `_C` of a build folder: `sanitized_pytest.py BUILD [pytest arguments]`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  before _C, which uses its OpenMP runtime

del os.environ["LD_PRELOAD"]  # compilers and interpreters that the tests start need no sanitizer

(path,) = Path(sys.argv[1]).glob("_C*.so")
spec = importlib.util.spec_from_file_location("regrpo_kernels._C", path)
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["regrpo_kernels._C"] = module
spec.loader.exec_module(module)

mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
assert any("libasan" in name for name in mapped), "the sanitizer is not loaded"
runtimes = [name for name in mapped if "gomp" in name or "libomp" in name or "iomp" in name]
assert len(runtimes) == 1, f"one OpenMP runtime is expected, found {runtimes}"
print(f"{path} with {runtimes[0]}")

sys.exit(pytest.main(sys.argv[2:]))
