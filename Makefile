# Everything a person or CI does with a checkout. Each target makes what it needs, in .venv, from the pinned versions of
# constraints/: lean.txt is enough to compress a model and to develop; full.txt is lean.txt and the real vLLM engine.
#
# torch comes first and by the ordinary client, since its build is the machine's choice: where the package index or a
# local wheel folder offers a CPU build, pip takes that; the index's own wheel for Linux x86 may be the CUDA build.
# Everything else is a closed list, installed as it stands (--no-deps): there is nothing left for pip to resolve, and
# vLLM's CPU build names companions of torch (torchaudio, torchvision, torchcodec) that it doesn't need here.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo-w4
# `make bench PEER_PYTHON=/path/to/python`: the Python of an environment that has llm-compressor. BENCH and TORTURE are
# further options of the two: `make bench BENCH="--model M --calibration TEXT --judge TEXT"`.
PEER_PYTHON ?=
BENCH ?=
TORTURE ?=
FUZZ ?=
# `make real REAL="--only 'gptq-w4*'"`: further options of benchmarks.real, for the three targets. FULL=1: all items.
REAL ?=
FULL ?=
# `make gpu GPU_PYTHON=/path/to/python`: an environment of your own with CUDA builds of torch and Triton, pytest,
# hypothesis, and what pyproject.toml asks for.
GPU_PYTHON ?= $(BIN)/python

# Processes that run the tests side by side; each computes on one core.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv venv-full demo test test-fast lint format docs bench real real-peers real-tasks gpu gpu-quantize torture torture-faults fuzz clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(VENV)/lean.stamp  ## The environment, without vLLM

venv-full: $(VENV)/full.stamp  ## The environment, with vLLM's CPU build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"llmshrink needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/lean.stamp: constraints/lean.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints/lean.txt torch
	$(BIN)/pip install --quiet --no-deps --requirement constraints/lean.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/full.stamp: constraints/full.txt $(VENV)/lean.stamp
	$(BIN)/pip install --quiet --no-deps --requirement constraints/full.txt
	@touch $@

demo: venv  ## Quantize the embedded model, prove it, let it speak
	$(BIN)/llmshrink quantize demo --output $(DEMO) --overwrite
	$(BIN)/llmshrink verify $(DEMO)
	$(BIN)/python -m llmshrink.demo.say $(DEMO)

lint: venv  ## ruff, the directions of import, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: venv  ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv  ## The site of docs/, in build/docs; a link that leads nowhere is an error
	$(BIN)/python docs/reference.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs

test: venv-full lint  ## Lint, types and every test, those with the real vLLM engine too
	$(BIN)/python -u -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-fast: venv  ## The tests of a minute: no engine, nothing slow
	$(BIN)/python -u -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not engine and not slow"

torture: venv  ## A hundred killed runs, a hundred identical results; TORTURE=--faults: see torture-faults
	$(BIN)/python -u -m benchmarks.torture $(TORTURE)

torture-faults: venv  ## A thousand errors of the system and damaged files, each the same bytes or one line
	$(BIN)/python -u -m benchmarks.torture --faults $(TORTURE)

fuzz: venv  ## Five thousand inputs that nobody would write, each read or refused in a line
	$(BIN)/python -u -m benchmarks.fuzz --keep build/fuzz $(FUZZ)

bench: venv  ## Time, memory and damage against the peers
	$(BIN)/python -u -m benchmarks $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON)) $(BENCH)

real: venv  ## A real language model: the damage of our recipes, in 90 minutes on two cores
	$(BIN)/python -u -m benchmarks.real $(REAL)

real-peers: venv  ## The same of llm-compressor, GPTQModel and AutoRound, each in an environment of its own
	$(BIN)/python -u -m benchmarks.real peers $(REAL)

real-tasks: venv  ## Downstream tasks on it, 300 items of each (FULL=1: all of them)
	$(BIN)/python -u -m benchmarks.real tasks $(if $(FULL),--full) $(REAL)

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),venv)  ## On a CUDA device: every kernel's tests, then the kernels' benchmarks
	PYTHONPATH=.:eval:kernels $(GPU_PYTHON) -m pytest -q tests/kernels
	PYTHONPATH=.:eval:kernels $(GPU_PYTHON) -m llmshrink bench kernels --shapes llama3-8b -o kernels/benchmarks/results
	PYTHONPATH=.:eval:kernels $(GPU_PYTHON) -m benchmarks.decode -o kernels/benchmarks/results

gpu-quantize:  ## On a CUDA device: where the time of quantizing a model of Llama-3-8B's shape goes
	PYTHONPATH=.:eval:kernels $(GPU_PYTHON) -u -m benchmarks.phases --llama 8b -o kernels/benchmarks/results

clean:  ## What was built, not the environment
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
