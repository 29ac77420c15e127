#!/usr/bin/env bash
# Builds the sdist, from it the wheel, and tries them: contents, and scripts/smoke_test.py in an empty environment.
# Takes minutes (it downloads torch once more) and needs a git checkout, for the list of files. PYTHON chooses the interpreter.
#
#   scripts/check_package.sh        what it makes lies in build/package: dist/, and the environment it tried
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
WORK=build/package
rm -rf $WORK
mkdir -p $WORK/empty
pip_install() { # environment, pip arguments
  "$PYTHON" -m venv "$WORK/$1"
  "$WORK/$1/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt "${@:2}"
}

echo "== build"
pip_install tools build
$WORK/tools/bin/python -m build --outdir $WORK/dist . >$WORK/build.log || { tail -30 $WORK/build.log; exit 1; }
sdist=$(echo $WORK/dist/*.tar.gz) wheel=$(echo $WORK/dist/*.whl)

echo "== contents"
tar tzf "$sdist" | sed 's|^[^/]*/||' | sort >$WORK/sdist.txt
"$PYTHON" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | sort >$WORK/wheel.txt
missing() { # name, list: the tracked files among the arguments that the list lacks
  local lacking
  lacking=$(git ls-files -- "${@:3}" | sort | comm -23 - "$2")
  [[ -z $lacking ]] || { printf 'error: the %s lacks\n%s\n' "$1" "$lacking" >&2; exit 1; }
}
surplus() { # name, list, pattern of what may be there
  local found
  found=$(grep -vE "$3" "$2" || true)
  [[ -z $found ]] || { printf 'error: the %s should not hold\n%s\n' "$1" "$found" >&2; exit 1; }
}
missing sdist $WORK/sdist.txt regrpo regrpo_kernels csrc tests bench examples configs scripts \
  CMakeLists.txt pyproject.toml constraints.txt Makefile LICENSE README.md
missing wheel $WORK/wheel.txt regrpo regrpo_kernels
{ git ls-files; echo PKG-INFO; } | sort | comm -13 - $WORK/sdist.txt >$WORK/untracked.txt
surplus sdist $WORK/untracked.txt '/$|^$'
! grep -nE '^\.ci/' $WORK/sdist.txt || { echo "error: .ci is in the sdist" >&2; exit 1; }
surplus wheel $WORK/wheel.txt '^(regrpo|regrpo_kernels)/.*(\.(py|pyi|css|js)|py\.typed|_C\.[^/]*\.so)$|^regrpo-[^/]*\.dist-info/'
grep -q '^regrpo_kernels/_C\..*so$' $WORK/wheel.txt || { echo "error: the wheel lacks the compiled kernels" >&2; exit 1; }

echo "== install and smoke test"
pip_install venv "$wheel"
root=$PWD
cd $WORK/empty # nothing of the checkout is on the path: what is imported is the wheel's
PATH=$root/$WORK/venv/bin:/usr/bin:/bin
python -I "$root/scripts/smoke_test.py"
regrpo --help >/dev/null
python -I -m regrpo --help >/dev/null
python -I -m regrpo_kernels
echo "passed: $sdist $wheel"
