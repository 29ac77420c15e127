#!/usr/bin/env bash
# Runs the peers' own tests of the entry points that regrpo_kernels.compat stands in for, against ours:
#
#   scripts/peer_suites.sh [liger] [trl] [verl] [-- pytest arguments]      (all of them by default)
#
# Liger ships its tests with its source distribution: they run with ours in the place of Liger's functions
# (scripts/peer_plugin.py), less those of Liger's internals and those listed below. TRL does not ship its tests, and verl's do
# not call the policy losses one by one: there tests/compat compares ours with the installed package.
# Peers come from the package index, pinned, into a virtual environment under build/; PYTHON chooses the one it sees through.
set -euo pipefail
cd "$(dirname "$0")/.."

LIGER=0.8.5 TRL=1.16.0 VERL=0.9.1
PYTHON=${PYTHON:-.venv/bin/python}
WORK=build/peers

suites=() arguments=()
while (($#)); do
  case $1 in
    --) shift; arguments=("$@"); break ;;
    liger | trl | verl) suites+=("$1") ;;
    *) echo "error: $1: expected liger, trl, verl or --" >&2; exit 2 ;;
  esac
  shift
done
((${#suites[@]})) || suites=(liger trl verl)

mkdir -p $WORK
peer_packages() { # into one folder a peer, in front of the path: the environment itself stays as it is
  "$PYTHON" -m pip install -q --disable-pip-version-check --upgrade --target "$WORK/$1" "${@:2}"
}

run_liger() {
  peer_packages liger --no-deps "liger-kernel==$LIGER"
  local source=$WORK/liger_kernel-$LIGER
  if [[ ! -d $source ]]; then
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
      -d $WORK "liger-kernel==$LIGER"
    tar xzf "$source.tar.gz" -C $WORK
  fi
  # Of Liger's internals: its chunked function, its base class, its reductions, a spy on its backward.
  local internal="chunk_forward or functional_correctness or test_reduce or backward_skips"
  # LUSPO with a KL and padding: Liger counts the KL of padding and divides by the padded length (docs/compat.md).
  local wrong="sequence-luspo and not 0.0-0.1-0.1"
  local python test=$PWD
  python=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
  (cd "$source" && PYTHONPATH=$test/scripts:$test:$test/$WORK/liger "$python" -m pytest -q -p peer_plugin -p no:cacheprovider \
    test/transformers/test_grpo_loss.py test/chunked_loss/test_grpo_loss.py \
    -k "not ($internal) and not (test_correctness and $wrong)" "${arguments[@]}")
}

run_trl() {
  peer_packages trl --no-deps "trl==$TRL" datasets pandas pyarrow multiprocess dill xxhash python-dateutil pytz six tzdata
  PYTHONPATH=$WORK/trl "$PYTHON" -m pytest -q tests/compat/test_trl.py "${arguments[@]}"
}

run_verl() { # everything that importing its losses needs, but torch
  peer_packages verl --no-deps "verl==$VERL" omegaconf antlr4-python3-runtime==4.9.3 tensordict orjson pyvers ray hydra-core \
    cloudpickle codetiming torchdata msgpack jsonschema referencing rpds-py jsonschema-specifications attrs importlib_metadata zipp
  PYTHONPATH=$WORK/verl "$PYTHON" -m pytest -q tests/compat/test_verl.py "${arguments[@]}"
}

failed=()
for suite in "${suites[@]}"; do
  echo "== $suite"
  "run_$suite" || failed+=("$suite")
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
echo "passed: ${suites[*]}"
