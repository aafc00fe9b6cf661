# Everything a developer or a newcomer needs; each target sets up what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test workers with one thread each: torch threads of several workers would fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help install test test-slow fuzz lint format demo bench gpu clean

help:
	@echo "make install    a virtual environment in $(VENV) with mim3d and its tools"
	@echo "make demo       the whole path on synthetic CT, in minutes: data to report"
	@echo "make test       the test suite (slow and GPU tests left out)"
	@echo "make test-slow  the slow tests: full-size networks, long runs"
	@echo "make fuzz       10,000 damaged files, and a set of 10,000 scans, one in 50 bad; renews docs/concepts/robustness.md"
	@echo "make lint       ruff and mypy (strict, see pyproject.toml)"
	@echo "make format     let ruff lay out the code"
	@echo "make bench      the benchmarks, results beside them"
	@echo "make gpu        what one GPU does with it, in ten minutes: kernels, steps, prediction, memory, loading"
	@echo "make clean      remove what demo and tools made (not $(VENV))"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

fuzz: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m tests.fuzz --num_files 10000 --num_scans 10000 --page docs/concepts/robustness.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src benchmarks demo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh build/demo

bench: $(STAMP)
	@for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
