# make demo | test | lint | docs | bench: each creates .venv and installs what it needs, once. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: help demo test lint docs bench clean

help:
	@echo "make demo   build data, train and compare the agents, write runs/demo (under 10 minutes on 2 cores)"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the documentation as a site in build/site; a warning is an error"
	@echo "make bench  time the kernels against eager and torch.compile"
	@echo "make clean  remove .venv and build"

demo: $(VENV)/.installed
	$(BIN)/regrpo demo --out runs/demo

test: $(VENV)/.installed-test
	$(BIN)/pytest -q

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-test
	$(BIN)/pytest bench/

clean:
	rm -rf $(VENV) build

# A stamp an extra. "dev" contains "test" contains the package alone, so the larger ones renew the smaller.
$(VENV)/.installed: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-dev: EXTRAS := [dev]
STAMPS_ = .installed
STAMPS_[test] = .installed .installed-test
STAMPS_[dev] = .installed .installed-test .installed-dev

$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev: $(VENV)/.created $(BUILD_INPUTS)
	@found=; for compiler in $${CXX:-c++ g++ clang++}; do command -v $$compiler >/dev/null && found=1; done; \
	 test -n "$$found" || { echo "error: no C++ compiler found ($${CXX:-c++, g++, clang++}). Install one" \
	 "(Debian, Ubuntu: apt-get install g++) or set CXX to its path." >&2; exit 1; }
	@echo "Installing regrpo$(EXTRAS) into $(VENV) (the first time this downloads torch)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".$(EXTRAS)"
	@touch $(addprefix $(VENV)/,$(STAMPS_$(EXTRAS)))

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.10 or newer," \
	 "or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is" \
	 "needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) has no venv module" \
	 "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
