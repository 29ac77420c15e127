#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under nine minutes: build, tests, benchmarks,
# compute-sanitizer, ncu, and a summary. Needs no network.
#
#   scripts/gpu_suite.sh [--out DIR] [--wheels DIR] [--python PYTHON] [--dry-run]
#
#   --out DIR     where summary.json, the benchmarks' JSON, ncu.csv and the logs go (default: $OUT, else runs/gpu_suite)
#   --wheels DIR  wheels of the peers to compare with (liger-kernel, trl, ...), installed without their dependencies
#   --python PY   the interpreter, with torch, pytest and the build tools installed (default: python3)
#   --dry-run     print the steps and stop
#
# A step that fails or runs out of time does not stop the next ones. The exit status is 0 if all passed, 1 if any
# failed, 2 if there is no CUDA device or an option is wrong. What the numbers should reach is in bench/gpu_summary.py.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

out=${OUT:-runs/gpu_suite}
wheels=""
python=python3
dry_run=false
while [ $# -gt 0 ]; do
  case $1 in
    --out | --wheels | --python)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case $1 in --out) out=$2 ;; --wheels) wheels=$2 ;; --python) python=$2 ;; esac
      shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
if [ -n "$wheels" ] && ! compgen -G "$wheels/*.whl" >/dev/null; then
  echo "error: --wheels $wheels holds no *.whl" >&2
  exit 2
fi

if $dry_run; then
  architecture=DEVICE
else
  # The device's own architecture alone: a sixth of the time that the default list takes.
  architecture=$("$python" - <<'PY'
import sys

try:
    import torch
except ImportError:
    sys.exit("error: this python has no torch; name another with --python")
if not torch.cuda.is_available():
    sys.exit("error: no CUDA device: torch.cuda.is_available() is False here; the suite needs one")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}a-real" if major == 9 else f"{major}{minor}-real")
PY
  ) || exit 2
  mkdir -p "$out/logs" || exit 2
  : >"$out/logs/steps.tsv"
fi
logs=$out/logs

# step NAME SECONDS COMMAND...: runs it with a time limit, its output in a log of its own
step() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  if $dry_run; then
    printf '%-22s %4d s  %s\n' "$name" "$limit" "$*"
    return
  fi
  timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - begin))" "$limit" >>"$logs/steps.tsv"
  printf '%-22s %4d s  exit %s\n' "$name" "$((SECONDS - begin))" "$code"
}

# absent NAME TOOL: a step that this machine has no tool for; the summary says so
absent() {
  echo "$1: no $2 here"
  printf '%s\tabsent\t0\t0\n' "$1" >>"$logs/steps.tsv"
}

# shellcheck disable=SC2329 # called by name, in a shell that can be timed out
build() {
  local missing=""
  "$python" -c "import scikit_build_core, pybind11" || missing="scikit-build-core or pybind11"
  for tool in cmake ninja nvcc; do command -v "$tool" >/dev/null || missing="$missing $tool"; done
  if [ -n "$missing" ]; then
    echo "error: not installed: $missing"
    return 1
  fi
  "$python" -m pip install -v --no-build-isolation --no-deps --no-index -e . \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture" && "$python" -m regrpo_kernels
}
export -f build
export python architecture

if [ -n "$wheels" ]; then
  step peers 20 "$python" -m pip install --no-index --no-deps "$wheels"/*.whl
fi
step build 85 bash -c build

parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 6) # Triton compiles on the host
step tests 115 "$python" -m pytest tests/kernels -m gpu -q "${parallel[@]}" --junitxml="$logs/tests.xml"

step bench-headline 125 "$python" -m pytest bench/ -q -k 16384x151936 --time-limit 105 \
  --benchmark-json="$out/bench-headline.json"
step bench-more 70 "$python" -m pytest bench/ -q -k "not 16384x151936" --time-limit 50 \
  --providers eager,liger,trl --benchmark-json="$out/bench-more.json"

# The four tools over both implementations at once: they spend their time on the host. Without torch's cache of
# blocks, an access past the end of a tensor is one past the end of an allocation.
# shellcheck disable=SC2329
sanitizer() {
  local pids=() code=0
  for tool in memcheck racecheck synccheck initcheck; do
    for impl in cuda triton; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --kernel-name regex='grpo|log_probs|advantages|rewards|scale_gradient|objective' \
        "$python" -m bench.sanitizer_cases "$impl" >"$logs/sanitizer-$tool-$impl.log" 2>&1 &
      pids+=($!)
    done
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=1; done
  return "$code"
}
export -f sanitizer
export logs
if $dry_run || command -v compute-sanitizer >/dev/null; then
  step sanitizer 80 bash -c sanitizer
else
  absent sanitizer compute-sanitizer
fi

metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,launch__registers_per_thread
if $dry_run || command -v ncu >/dev/null; then
  # the clocks are left as they are
  step ncu 45 ncu --clock-control none --kernel-name 'regex:grpo_loss|token_log_probs' --metrics "$metrics" \
    --print-units base --csv --page raw --log-file "$out/ncu.csv" "$python" -m bench.profile_rows
else
  absent ncu ncu
fi

$dry_run && exit 0
"$python" -m bench.gpu_summary "$out"
code=$?
tar -C "$out" -czf "$out/logs.tar.gz" logs && rm -r "$logs"
exit "$code"
