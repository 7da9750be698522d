# Every command a person needs. `make` alone lists them. CI calls `make lint test`.

PYTHON ?= python3
# The one torch that development and CI use; the package itself supports every version from the floor in pyproject.toml on.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
BUILD := build
JOBS ?= $(shell nproc)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash -o pipefail

CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp')
TIDY_BUILD := $(BUILD)/lint

.DEFAULT_GOAL := help
.PHONY: help develop library system train compare compare-estimators balance test test-cpp test-python build-tests lint lint-python lint-format lint-tidy format bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- Set-up ----------------------------------------------------------------------------------------------------------------

develop: $(VENV)/.complete library  ## Set up .venv: pinned torch, every extra, the tools, the package itself

# Everything but the library; made again when what it installs changes.
$(VENV)/.complete: pyproject.toml setup.py Makefile | system
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"make: PYTHON must be 3.10 or later, got {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	@echo "make: setting up $(VENV) with $(TORCH), the extras and the tools (once, two minutes or so)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@$(PIP) 'setuptools>=77' cmake ninja
	@echo "make: building the library (three minutes or so on two cores)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[train,bench,dev]'
	@touch $@

# The library follows its sources at every command; nothing changed costs a second.
library: $(VENV)/.complete
	@mkdir -p $(BUILD)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace > $(BUILD)/library.log 2>&1 || { cat $(BUILD)/library.log; exit 1; }

# A C++ compiler and Python's headers are needed; ccache and Catch2 save time (CMake fetches Catch2 where it is missing).
system:
	@missing=""; \
	command -v c++ > /dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || missing="$$missing python3-dev"; \
	command -v git > /dev/null || missing="$$missing git"; \
	wanted="$$missing"; \
	command -v ccache > /dev/null || wanted="$$wanted ccache"; \
	test -e /usr/include/catch2 || wanted="$$wanted catch2"; \
	if [ -n "$$wanted" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "make: installing$$wanted with apt-get"; \
	  apt-get update -qq > /dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$wanted > /dev/null || \
	    { test -z "$$missing" || { echo "make: could not install$$missing"; exit 1; }; }; \
	elif [ -n "$$missing" ]; then \
	  echo "make: this needs the Debian packages$$missing; as root: apt-get install$$missing"; exit 1; \
	fi

# ---- Use -------------------------------------------------------------------------------------------------------------------

train: develop  ## Train a small MoE language model on real text (ARGS="--help" for its options)
	$(BIN)/python examples/train_lm.py $(ARGS)

compare: develop  ## Train the MoE and a dense model of equal active parameters, half an hour (ARGS="--help")
	$(BIN)/python examples/compare_lm.py $(ARGS)

compare-estimators: develop  ## Train the MoE with each gradient estimator, over an hour (ARGS="--help")
	$(BIN)/python examples/compare_estimators.py $(ARGS)

balance: develop  ## Let a collapsed router recover under each way of balancing, minutes (ARGS="--help")
	$(BIN)/python examples/balance.py $(ARGS)

bench: develop  ## Time the layer beside its peers and the dense bound (ARGS="--help")
	$(BIN)/python -m benchmarks.moe_layer $(ARGS)

# ---- Check -----------------------------------------------------------------------------------------------------------------

test: test-cpp test-python  ## Run every test, C++ and Python

test-cpp: build-tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

test-python: build-tests
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

# pytest needs them too: it runs a C++ program beside the Python layer.
build-tests: develop
	@echo "make: building the C++ tests"
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(BUILD) -DTORCHMOE_BUILD_TESTS=ON > $(BUILD)/tests.log 2>&1 || { cat $(BUILD)/tests.log; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(BUILD) -j $(JOBS) >> $(BUILD)/tests.log 2>&1 || { cat $(BUILD)/tests.log; exit 1; }

lint: lint-format lint-python lint-tidy  ## Check formatting, types and the analysers' findings

lint-format: $(VENV)/.complete
	@echo "clang-format --dry-run -Werror"; $(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

lint-python: develop
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# clang-tidy spends its time on torch's headers, so that it reads our sources a dozen to the unit. It knows neither gcc's
# precompiled header nor its OpenMP header.
lint-tidy: develop
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(TIDY_BUILD) -GNinja \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DTORCHMOE_BUILD_PYTHON=ON \
	  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=12 \
	  > $(TIDY_BUILD).log 2>&1 || { cat $(TIDY_BUILD).log; exit 1; }
	@echo "clang-tidy"; find $(TIDY_BUILD) -name 'unity_*.cxx' | xargs -n 1 -P $(JOBS) \
	  $(BIN)/clang-tidy -p $(TIDY_BUILD) --quiet --extra-arg=-fno-openmp 2> >(grep -v 'warnings generated' >&2)

format: $(VENV)/.complete  ## Format everything
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove what was built (the environment stays: rm -r .venv)
	rm -rf $(BUILD) python/torchmoe/*.so python/torchmoe/_build.py python/torchmoe/include python/torchmoe/share
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
