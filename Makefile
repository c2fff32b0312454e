# The only entry points. Each sets up what it needs on a fresh machine.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUN := $(BIN)/python -m

.PHONY: demo test test-all evidence certified lint docs bench

demo: $(READY)
	$(BIN)/python examples/demo.py

# A worker for each core, and a thread for each worker: two threads on a busy core wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n auto --maxprocesses 8 --dist worksteal

test: $(READY)
	$(PYTEST) -m "not slow and not gpu"

# What judges by time has the machine to itself.
test-all: $(READY)
	$(PYTEST) -m "not gpu and not alone"
	OMP_NUM_THREADS=1 $(RUN) pytest -m alone

lint: $(READY)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright
	$(BIN)/lint-imports --no-cache

# torch first and alone: on a CPU machine, another package would bring the CUDA build with it.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# Long; goes on where it was. Records lie in evidence/records, the summary in docs/evidence.md.
evidence: $(READY)
	$(BIN)/python evidence/run.py

# The part of it that certifies layouts: docs/certified.md.
certified: $(READY)
	$(BIN)/python evidence/certified.py

docs: $(READY)
	$(BIN)/python docs/generate.py

bench: $(READY)
	$(BIN)/paceline bench train
	$(BIN)/paceline bench generate
	$(BIN)/paceline bench axes
