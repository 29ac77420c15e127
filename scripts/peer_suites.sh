#!/usr/bin/env bash
# Runs the peers' own tests of the entry points that regrpo_kernels.compat stands in for, against ours:
#
#   scripts/peer_suites.sh [liger] [trl] [verl] [-- pytest arguments]      (all of them by default)
#
# Liger ships its tests with its source distribution: they run with ours in the place of Liger's functions
# (scripts/peer_plugin.py, which lists what is left out). TRL does not ship its tests, and verl's do
# not call the policy losses one by one: there tests/compat compares ours with the installed package.
# Pinned peers come from the package index into folders under build/, in front of the path of PYTHON's environment
# (called site-packages: dill, under TRL's datasets, pickles whole modules that lie anywhere else).
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
cannot() { # peer, what
  echo "error: $1 was not tested: $2 (the lines above say why)" >&2
  return 1
}
peer_packages() { # peer, pip arguments
  "$PYTHON" -m pip install -q --disable-pip-version-check --upgrade --target "$WORK/$1/site-packages" "${@:2}" ||
    cannot "$1" "pip could not install ${*:2}"
}
peer_import() { # peer, module: without it tests would be skipped
  PYTHONPATH=$WORK/$1/site-packages "$PYTHON" -c "import $2" || cannot "$1" "import $2 failed"
}

run_liger() {
  peer_packages liger --no-deps "liger-kernel==$LIGER" || return 1
  local source=$WORK/liger_kernel-$LIGER
  if [[ ! -d $source ]]; then
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
      -d $WORK "liger-kernel==$LIGER" && tar xzf "$source.tar.gz" -C $WORK ||
      { cannot liger "its source distribution, which has its tests, could not be downloaded"; return 1; }
  fi
  local python root=$PWD
  python=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
  (cd "$source" && PYTHONPATH=$root/scripts:$root:$root/$WORK/liger/site-packages "$python" -m pytest -q -p peer_plugin -p no:cacheprovider \
    test/transformers/test_grpo_loss.py test/chunked_loss/test_grpo_loss.py "${arguments[@]}")
}

run_trl() {
  peer_packages trl --no-deps "trl==$TRL" datasets pandas pyarrow multiprocess dill xxhash python-dateutil pytz six tzdata || return 1
  peer_import trl trl || return 1
  PYTHONPATH=$WORK/trl/site-packages "$PYTHON" -m pytest -q tests/compat/test_trl.py tests/compat/test_peer_signatures.py "${arguments[@]}"
}

run_verl() { # what importing its losses needs; torch stays the environment's
  peer_packages verl omegaconf orjson pyvers hydra-core codetiming cloudpickle ray || return 1
  peer_packages verl --no-deps "verl==$VERL" tensordict || return 1
  peer_import verl verl.trainer.ppo.core_algos || return 1
  PYTHONPATH=$WORK/verl/site-packages "$PYTHON" -m pytest -q tests/compat/test_verl.py tests/compat/test_peer_signatures.py "${arguments[@]}"
}

failed=()
for suite in "${suites[@]}"; do
  echo "== $suite"
  "run_$suite" || failed+=("$suite")
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
echo "passed: ${suites[*]}"
