# `make demo` and `make test` install everything they need into .venv, and run.
PYTHON ?= python3
# Threads that wait must not spin: on a busy machine that costs more than it saves.
export OMP_WAIT_POLICY = passive
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs test-slow clean

demo: $(READY)
	$(BIN)/carv-attrib demo --output demo-out

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/sphinx-build --quiet -W --keep-going -b html docs docs/_build/html

test: check docs
	$(BIN)/pytest -n 2 --cov --cov-report=term-missing:skip-covered

test-slow: $(READY)
	$(BIN)/pytest -n 2 -m "slow or not slow"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo-out build *.egg-info
