# `make demo` and `make test` do all their own set-up: they need Python (3.11 or newer), make and pip, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PYTHONWARNINGS ?= ignore::UserWarning:multiprocessing.resource_tracker

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/microglia demo --out runs/demo

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and alone: with it in place nothing else asks for another build of it, and the kernels build against it.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard src/microglia/runtime/kernels/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch 'setuptools>=77'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[zoo,export,dev]'
	touch $(READY)

clean:
	rm -rf .venv runs build
