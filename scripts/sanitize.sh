#!/usr/bin/env bash
# Runs tests/kernels once with the C++ kernels built under AddressSanitizer and UndefinedBehaviorSanitizer:
#   scripts/sanitize.sh [pytest arguments]
# Needs GCC, cmake and an environment with the tests' requirements (PYTHON chooses it). Exits non-zero on any finding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$(command -v "${PYTHON:-python3}")"
CXX="${CXX:-g++}"
BUILD=build/sanitize
mkdir -p build

verdict() { echo "sanitize: $1"; }
trap 'verdict "FAILED; the log of the build is $BUILD.log"' ERR

cmake -S . -B "$BUILD" -DREGRPO_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER="$CXX" \
  -DPython_EXECUTABLE="$PYTHON" -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >"$BUILD.log"
cmake --build "$BUILD" --parallel 2 >>"$BUILD.log"

# Neither Triton nor test_cuda_on_cpu.py, which builds a module of its own, runs what is instrumented here.
# libasan has to come first in the process, and libstdc++ before an exception is thrown. The interpreter leaks by
# design. An error aborts, so that pytest cannot take it for a failed test and go on; its report is not captured.
LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:allocator_may_return_null=1 \
  UBSAN_OPTIONS=halt_on_error=1:abort_on_error=1:print_stacktrace=1 \
  "$PYTHON" scripts/sanitized_pytest.py "$BUILD" tests/kernels -q --capture=sys -p no:faulthandler \
    --ignore=tests/kernels/test_cuda_on_cpu.py -m "not fuzz and not gpu" -k "not triton" "$@"
verdict "no findings"
