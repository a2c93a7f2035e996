# Everything happens in .venv, made here; needs only Python >= 3.10 and a network for pip.
# `make demo` shows the whole on real input, `make test` proves it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test check bench clean

demo: $(VENV)/.demo
	$(BIN)/sparsifiner-edge demo -o $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/portable_cpu.py
	$(BIN)/python benchmarks/fidelity.py

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo "Python lacks the module venv: install it (Debian, Ubuntu: sudo apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Where the package index serves CUDA builds of torch, this downloads some gigabytes once.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The oldest runtime that exported files must load in, beside the current one; a test runs them in it.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/onnxruntime-1.21 'onnxruntime==1.21.*'
	# The base install alone: tests import everything in it that must not need more.
	$(PYTHON) -m venv $(VENV)/bare
	$(VENV)/bare/bin/python -m pip install --quiet --editable .
	@touch $@ $(VENV)/.demo
