# The two commands of the README, and what contributors need. Each target sets up what it lacks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup quickstart demo-network test check docs bench clean

setup: $(READY)

# pip says nothing while it downloads, so each step says what it is doing.
$(READY): pyproject.toml constraints.txt
	@echo "setup: creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch (a few hundred MB the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@echo "setup: installing atoll and what it needs"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "setup: done"

quickstart: $(READY)
	@echo "quickstart: from here on atoll is $(BIN)/atoll, and plain atoll after: source $(BIN)/activate"
	$(BIN)/atoll run quickstart

demo-network: $(READY)
	$(BIN)/python examples/network.py

# A file's tests stay together and in order, for a federation's build on each other; models are so small that a second thread
# only waits.
test: $(READY) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check src tests benchmarks docs examples experiments
	$(BIN)/ruff format --check src tests benchmarks docs examples experiments
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) site build
