# Bare `make` lists the targets. `demo` and `test` do their own set-up in .venv.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= python3
DEMO := demo-out

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-all test-latest test-consumers test-notebook test-browser screenshots check fix fuzz test-gpu bench bench-gpu golden table docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
	@touch $(STAMP)

setup: $(STAMP) ## make .venv and install quark with its development tools

demo: $(STAMP) ## quantize the embedded model to nvfp4 and show what was lost
	$(BIN)/quark plan --model demo --scheme nvfp4 --calib-data builtin --calib-samples 64 --calib-seqlen 256
	$(BIN)/quark quantize --model demo --scheme nvfp4 --calib-data builtin --calib-samples 64 --calib-seqlen 256 \
		-o $(DEMO) --overwrite
	$(BIN)/quark report $(DEMO)
	$(BIN)/quark eval $(DEMO) --baseline demo

# One thread a process: processes with two threads each would wait for each other on two cores. Some tests wait for other
# processes or for time to pass, so that three fill two cores. Each takes neighbours, which share what they prepare.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
test: $(STAMP) ## run the tests that need no GPU, every member of every family once
	$(PYTEST) -m "not gpu and not slow" -n 3 --dist worksteal --durations 12

test-all: $(STAMP) ## run those and the full products (an hour)
	$(PYTEST) -m "not gpu" -n 2 --durations 30

OLDEST ?=
test-latest: ## run the tests on the newest releases of all dependencies, with OLDEST=1 on the oldest allowed
	$(PYTHON) -m tests.releases $(if $(OLDEST),oldest,newest)

# VLLM_PYTHON: the Python of an environment that has vLLM's CPU build already.
CONSUMERS := .venv-consumers
VLLM_PYTHON ?= $(CONSUMERS)/bin/python
$(CONSUMERS)/bin/python:
	$(PYTHON) tests/consumers/vllm/install.py $(CONSUMERS) || (rm -rf $(CONSUMERS); false)

test-consumers: $(STAMP) $(filter $(CONSUMERS)/bin/python,$(VLLM_PYTHON)) ## load what servers are said to load in vLLM's CPU build; into docs/consumers.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.consumers.vllm.run $(VLLM_PYTHON) --record $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.consumers.promised
	$(BIN)/python -m tests.docs.serving

test-notebook: $(STAMP) ## run docs/quark.ipynb in a kernel of Jupyter, which is installed into .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,notebook]'
	$(PYTEST) -m slow tests/docs/test_notebook.py

test-browser: $(STAMP) ## open report.html in Debian's chromium, which is installed where root may do so; into docs/images
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.browser.run

screenshots: $(STAMP) ## plan, quantize and report in terminals of 80 and 120 columns; into docs/images
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.browser.terminal

lock: ## write constraints.txt anew: the newest releases but those held in tests/releases.py
	$(PYTHON) -m tests.releases lock

check: $(STAMP) ## lint, formatting, types, and that the shipped lists are those of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.docs.listings --check

fix: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

SEED ?= 0
fuzz: $(STAMP) ## hostile inputs at random for five minutes: make fuzz SEED=N
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seed $(SEED) --seconds 300

test-gpu: $(STAMP) ## run the tests that need a CUDA device, within 8 minutes; into docs/gpu.json
	$(BIN)/python -m tests.gpu.record; code=$$?; $(BIN)/python -m tests.docs.gpu && exit $$code

bench-gpu: $(STAMP) ## kernels and jobs on a CUDA device, within 8 minutes; into docs/gpu.json and docs/benchmarks.md
	$(BIN)/python -m tests.bench.gpu; code=$$?; $(BIN)/python -m tests.docs.gpu && exit $$code

bench: $(STAMP) ## memory, start-up, packing speed against a baseline in the same run; forecasts against runs
	$(BIN)/python -m tests.bench.startup
	$(BIN)/python -m tests.bench.plan
	$(BIN)/python -m tests.bench.packing
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.datafree
	$(BIN)/python -m tests.bench.calibrated
	$(BIN)/python -m tests.bench.predict
	$(BIN)/python -m tests.bench.ranks

golden: $(STAMP) ## compare calibrated runs with those of another commit on this machine: make golden BASE=<commit>
	$(BIN)/python -m tests.golden.compare $(BASE)

MODEL ?= demo
table: $(STAMP) ## loss of every scheme for one model: make table MODEL=DIR ARGS='--calib FILE --text FILE'
	$(BIN)/python -m tests.bench.table $(MODEL) $(ARGS)

docs: $(STAMP) ## rebuild the generated reference pages and the lists that are shipped
	$(BIN)/python -m tests.docs.listings
	$(BIN)/python -m tests.docs.errors
	$(BIN)/python -m tests.docs.reference
	$(BIN)/python -m tests.docs.readme
	$(BIN)/python -m tests.docs.recipe_reference
	$(BIN)/python -m tests.docs.algorithms
	$(BIN)/python -m tests.docs.models
	$(BIN)/python -m tests.docs.serving
	$(BIN)/python -m tests.docs.big_models
	$(BIN)/python -m tests.docs.gpu
	$(BIN)/python -m tests.docs.report

clean: ## remove everything that was built
	rm -rf $(VENV) $(CONSUMERS) $(DEMO) $(DEMO).partial build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
