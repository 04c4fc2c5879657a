# `make demo` and `make test` do all their own set-up: they need Python (3.11 or newer), make and pip, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := data,train,report,zoo,export,mobile,serve,track,hub,cluster,docs,dev
export PYTHONWARNINGS ?= ignore::UserWarning:multiprocessing.resource_tracker

.PHONY: demo test lint docs clean

demo: $(READY)
	$(BIN)/microglia demo --out runs/demo

# Processes of tests share what one of them has compiled of the library, also where Python is told to write no bytecode.
test: $(READY) lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY) # build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What the tests need. torch is pinned, and in one call nothing asks for another build of it.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard src/microglia/runtime/kernels/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(READY)

clean:
	rm -rf .venv runs build
