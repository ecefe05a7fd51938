# Everything runs in .venv, made on first use: on a fresh machine nothing comes before `make demo` or `make test`.
PYTHON ?= python3
# Installed first and pinned, because plain `torch` may draw gigabytes of CUDA packages. Override it on a GPU
# machine: `make demo TORCH=torch` takes the newest CUDA build, TORCH= leaves the choice to the dependencies.
TORCH ?= torch==2.13.0
TORCHCODEC ?= torchcodec==0.13.*
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes side by side: for the fast tests one more than cores, as there is always one that waits for processes of
# its own; the slow ones keep every core busy. Tests that measure something or start many processes share one.
JOBS ?=
CORES := $(shell nproc 2>/dev/null || echo 2)
PYTEST := $(BIN)/python -m pytest --dist loadgroup --no-loadscope-reorder -n
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO ?=

# Tests start hundreds of processes: what Python compiles for one is kept for the next.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test extras test-slow test-exhaustive test-cluster mutants gpu lint types check wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip setuptools wheel
	@if [ -n "$(TORCH)" ]; then echo "installing $(TORCH)"; $(PIP) install $(TORCH); fi
	@touch $@

$(VENV)/teachers.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing cliplift with the teachers extra"
	$(PIP) install -e '.[teachers]' $(TORCH)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing cliplift with the dev extra"
	$(PIP) install -e '.[dev]' $(TORCH)
	@mkdir -p build/types && ln -sfn ../.. build/types/cliplift
	@touch $@ $(VENV)/teachers.stamp

# Each torchcodec is built for one torch: 0.13 for 2.13.
$(VENV)/extras.stamp: $(VENV)/dev.stamp
	@echo "installing the extras ray, shots, flow and decoders"
	$(PIP) install -e '.[dev,ray,shots,flow,decoders]' $(TORCH) $(TORCHCODEC)
	@touch $@

$(VENV)/mutation.stamp: $(VENV)/dev.stamp
	@echo "installing the extra mutation"
	$(PIP) install -e '.[dev,mutation]' $(TORCH)
	@touch $@

install: $(VENV)/teachers.stamp ## make .venv with cliplift and the 2D teacher

demo: $(VENV)/teachers.stamp ## raw clips to a finetuned, evaluated model and a report, on a CPU in minutes
	$(BIN)/cliplift demo $(DEMO)

test: $(VENV)/dev.stamp ## the fast tests (real videos, real DeepSpeed processes), at most ten minutes
	$(PYTEST) $(or $(JOBS),$(shell expr $(CORES) + 1))

extras: $(VENV)/extras.stamp ## install what the optional parts need (Ray, shot detection, optical flow, torchcodec)

TESTS ?=

test-slow: $(VENV)/dev.stamp ## the tests that take up to minutes each; needs `make extras` for those of optional parts
	$(PYTEST) $(or $(JOBS),$(CORES)) -m "slow and not exhaustive and not gpu and not cluster" $(TESTS)

test-exhaustive: $(VENV)/dev.stamp ## the slow tests on every further case: hours
	$(PYTEST) $(or $(JOBS),$(CORES)) -m "exhaustive and not gpu and not cluster" $(TESTS)

test-cluster: $(VENV)/dev.stamp ## two hosts in network namespaces and a real Slurm; needs root
	$(BIN)/python -m pytest -m cluster

MUTANTS ?= 40
MODULES ?=

mutants: $(VENV)/mutation.stamp ## change one place of a module at a time and see that its tests notice; see docs/testing.md
	$(BIN)/python tests/mutation/run.py --mutants $(MUTANTS) --modules "$(MODULES)"

MINUTES ?= 7
GPU_TABLE ?= runs/gpu.json

gpu: $(VENV)/dev.stamp ## on a GPU machine: the tests that need one, then the table of docs/performance.md
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m gpu
	$(BIN)/cliplift bench gpu --minutes $(MINUTES) --output $(GPU_TABLE)

lint: $(VENV)/dev.stamp ## ruff: style and imports
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/dev.stamp ## mypy --strict
	@mkdir -p build/types && ln -sfn ../.. build/types/cliplift
	$(BIN)/mypy

check: lint types test ## everything a change must pass

wheel: $(VENV)/dev.stamp ## build a wheel into dist/
	$(PIP) install build && $(BIN)/python -m build --wheel

clean: ## remove caches and builds; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
