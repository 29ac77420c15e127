"""`python -m regrpo_kernels` prints `build_info()`."""

from regrpo_kernels import build_info

for name, value in build_info().items():
    print(f"{name:20} {value}")
