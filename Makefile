# Every command a person needs. `make` alone lists them. CI calls `make lint test`.

PYTHON ?= python3
# The one torch that development and CI use; the package itself supports every version from the floor in pyproject.toml on.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
BUILD := build
# As many compilers, or processes of tests, as there are cores and gigabytes; MAX_JOBS says otherwise.
JOBS := $(shell $(PYTHON) cmake/build_jobs.py)
# A compiler's warning is an error for those who change the sources, not for those who install them.
export CMAKE_ARGS := -DTORCHMOE_WERROR=ON $(CMAKE_ARGS)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash -o pipefail

CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu')
CUDA_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.cu')
CUDA_ADAPTERS = $(shell git ls-files --cached --others --exclude-standard 'csrc/cuda/*.cpp')
TIDY_BUILD := $(BUILD)/lint

.DEFAULT_GOAL := help
.PHONY: help additions certificates copy develop library system support support-torch test-torch test-wheel train compare compare-estimators compare-routers balance classify study-cache walkthrough offload-demo report-cpu test test-cpp test-python test-capabilities test-aarch64 test-emulation test-studies cuda-library test-cuda report-cuda build-tests lint lint-python lint-format lint-tidy cuda-check format bench clean wheel wheel-torch docs tutorials browse

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- Set-up ----------------------------------------------------------------------------------------------------------------

develop: $(VENV)/.complete library  ## Set up .venv: pinned torch, every extra, the tools, the package itself

# Everything but the library; made again when what it installs changes, and from nothing when it is another folder's or another torch's: what
# is installed and built names the folder in which it was made.
ifneq '$(file < $(VENV)/.complete)' '$(CURDIR) $(TORCH)'
.PHONY: $(VENV)/.complete
$(VENV)/.complete: STALE := $(VENV) $(BUILD)
endif
$(VENV)/.complete: pyproject.toml setup.py Makefile | system
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"make: PYTHON must be 3.10 or later, got {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	@echo "make: setting up $(VENV) with $(TORCH), the extras and the tools (once, two minutes or so)"
	@rm -rf $(STALE)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)' 'setuptools>=77' cmake ninja
	@echo "make: building the library (three minutes or so on two cores)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[train,bench,dev]'
	@printf '%s' '$(CURDIR) $(TORCH)' > $@

# The library follows its sources at every command; nothing changed costs a second.
library: $(VENV)/.complete
	@mkdir -p $(BUILD)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace > $(BUILD)/library.log 2>&1 || { cat $(BUILD)/library.log; exit 1; }

INSTALL := apt-get update -qq > /dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq

# A C++ compiler is needed, and Doxygen for the site, without which its test is skipped; torch.compile and its tests want Python's headers; ccache and
# Catch2 save time (CMake fetches Catch2 where it is missing).
system:
	@missing=""; \
	command -v c++ > /dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || missing="$$missing python3-venv"; \
	command -v git > /dev/null || missing="$$missing git"; \
	wanted="$$missing"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || wanted="$$wanted python3-dev"; \
	command -v ccache > /dev/null || wanted="$$wanted ccache"; \
	command -v doxygen > /dev/null || wanted="$$wanted doxygen"; \
	test -e /usr/include/catch2 || wanted="$$wanted catch2"; \
	if [ -n "$$wanted" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "make: installing$$wanted with apt-get"; \
	  $(INSTALL) $$wanted > /dev/null || \
	    { test -z "$$missing" || { echo "make: could not install$$missing"; exit 1; }; }; \
	elif [ -n "$$missing" ]; then \
	  echo "make: this needs the Debian packages$$missing; as root: apt-get install$$missing"; exit 1; \
	fi

# ---- Use -------------------------------------------------------------------------------------------------------------------

train: develop  ## Train a small MoE language model on real text (ARGS="--help" for its options)
	$(BIN)/python examples/train_lm.py $(ARGS)

compare: develop  ## Train mixtures and dense models for the same time, two to three hours (ARGS="--help")
	$(BIN)/python -m studies.dense $(ARGS)

compare-estimators: develop  ## Train the MoE with each gradient estimator, 40 minutes (ARGS="--help")
	$(BIN)/python -m studies.estimators $(ARGS)

compare-routers: develop  ## Train the MoE with each causal router, and with experts that talk, half an hour (ARGS="--help")
	$(BIN)/python -m studies.routers $(ARGS)

balance: develop  ## Let a collapsed router recover under each way of balancing, minutes (ARGS="--help")
	$(BIN)/python -m studies.balance $(ARGS)

classify: develop  ## Classify text with every router, those that look ahead too, minutes (ARGS="--help")
	$(BIN)/python -m studies.classification $(ARGS)

study-cache: develop  ## Measure what a RoutingCache finds, changes and saves, a quarter of an hour (ARGS="--help")
	$(BIN)/python -m studies.routing_cache $(ARGS)

walkthrough: develop  ## Show one gate decision step by step, with every number (ARGS="--help")
	$(BIN)/python examples/gating_walkthrough.py $(ARGS)

offload-demo: develop  ## Stream experts from files with room for a part of them, a minute (ARGS="--help")
	$(BIN)/python examples/offload_demo.py --figure $(ARGS)

bench: develop  ## Time the layer against its peers and the dense bound (ARGS="--help")
	$(BIN)/python -m benchmarks.moe_layer $(ARGS)

report-cpu: develop  ## Measure the CPU kernels and write docs/measured_cpu.md, minutes (ARGS="--help")
	$(BIN)/python -m benchmarks.cpu_report $(ARGS)

# ---- Check -----------------------------------------------------------------------------------------------------------------

test: test-cpp test-python test-capabilities test-aarch64 test-emulation  ## Run every test, C++ and Python

test-cpp: build-tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

# Each core takes a file of tests at a time, since what some files prepare once serves all of their tests. A thread that waits must not
# spin: the tests that run at the same time need the core.
PYTEST = OMP_WAIT_POLICY=PASSIVE PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-python: build-tests
	$(PYTEST)

# The products' kernels for instruction sets that this processor has but torch did not choose, and the way without any.
test-capabilities: build-tests
	@for capability in avx2 default; do echo "ATEN_CPU_CAPABILITY=$$capability"; \
	  ATEN_CPU_CAPABILITY=$$capability $(PYTEST) --dist worksteal \
	  tests/python/ops/test_{expert_mlp,grouped_linear,router_logits,attach_dense_gradient,bad_plan,subsets}.py tests/python/test_questions.py || exit 1; done

# The room cpu/simd alone, which needs no torch. Its compiler and emulator are asked for by this target only: nothing else needs them.
AARCH64 := $(BUILD)/aarch64
test-aarch64: $(VENV)/.complete  ## Run the tests of the CPU kernels for aarch64, under qemu
	@missing=""; \
	command -v aarch64-linux-gnu-g++ > /dev/null || missing="$$missing g++-aarch64-linux-gnu"; \
	command -v qemu-aarch64 > /dev/null || missing="$$missing qemu-user"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "make: installing$$missing with apt-get"; \
	  $(INSTALL) $$missing > /dev/null && missing=""; \
	fi; \
	if [ -n "$$missing" ]; then echo "test-aarch64: skipped, this needs the Debian packages$$missing"; exit 0; fi; \
	echo "make: building the tests of cpu/simd for aarch64"; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	{ cmake -S tests/cpp/simd -B $(AARCH64) -GNinja -DTORCHMOE_WERROR=ON --toolchain $(CURDIR)/tests/cpp/simd/aarch64.cmake && \
	  cmake --build $(AARCH64) -j $(JOBS); } > $(AARCH64).log 2>&1 || { cat $(AARCH64).log; exit 1; }; \
	ctest --test-dir $(AARCH64) --output-on-failure

# The CUDA kernels, run thread by thread on the host: all but 1,300 tokens through every expert, which take minutes.
test-emulation: build-tests  ## Run the CUDA kernels on the host through the tests of every op
	PYTHONPATH="$(BUILD)/emulation" $(PYTEST) --dist worksteal tests/python/ops \
	  -m "not above_kernels and not cpu_only" -k "not (AttachDense and more_than_one_block)"

test-studies: develop  ## Run the full tests of the studies
	$(PYTEST) tests/python/studies -m study

# The Python of the targets below. Another than .venv's, such as a GPU machine's own, must have torch, cmake, pytest and hypothesis:
# make test-cuda CUDA_PYTHON=python3
CUDA_PYTHON := $(BIN)/python
CUDA_PATH = PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/python"
cuda-library: $(if $(filter $(BIN)/python,$(CUDA_PYTHON)),develop)
	@$(CUDA_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make: needs a GPU, and torch.cuda.is_available() is false")'
	@mkdir -p $(BUILD)
	@$(CUDA_PATH) $(CUDA_PYTHON) setup.py --quiet build_ext --inplace > $(BUILD)/library.log 2>&1 || { cat $(BUILD)/library.log; exit 1; }
	@if [ -x $(BUILD)/tests/cpp/torchmoe_tests ]; then $(CUDA_PATH) cmake --build $(BUILD) -j $(JOBS) --target torchmoe_tests > $(BUILD)/tests.log 2>&1 || { cat $(BUILD)/tests.log; exit 1; }; fi

# Catch2's where make build-tests has been run.
test-cuda: cuda-library  ## Run the tests that need a GPU
	@if [ -x $(BUILD)/tests/cpp/torchmoe_tests ]; then $(BUILD)/tests/cpp/torchmoe_tests "[cuda]"; \
	else echo "test-cuda: without Catch2's tests, which are not built here"; fi
	$(CUDA_PATH) $(CUDA_PYTHON) -m pytest tests/python/cuda -m cuda

report-cuda: cuda-library  ## Test, time and sanitize on a GPU, and write docs/measured_cuda.md (ARGS="--help")
	$(CUDA_PATH) $(CUDA_PYTHON) -m benchmarks.cuda_report $(ARGS)

# pytest needs them too: it compares a C++ program with the Python layer.
build-tests: develop
	@echo "make: building the C++ tests"
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(BUILD) -DTORCHMOE_BUILD_TESTS=ON -DTORCHMOE_BUILD_EMULATION=ON > $(BUILD)/tests.log 2>&1 || { cat $(BUILD)/tests.log; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(BUILD) -j $(JOBS) >> $(BUILD)/tests.log 2>&1 || { cat $(BUILD)/tests.log; exit 1; }

lint: lint-format lint-python lint-tidy cuda-check  ## Check formatting, types and the analysers' findings

lint-format: $(VENV)/.complete
	@echo "clang-format --dry-run -Werror"; $(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

lint-python: develop
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# clang-tidy spends its time on torch's headers, so that it reads our sources a dozen to the unit. It does not know gcc's precompiled
# header, nor all that gcc's omp.h says of functions. It reads the parallel regions as clang compiles them, which is stricter.
TIDY_OPENMP = --extra-arg=-fopenmp --extra-arg='-D__malloc__(free)=__malloc__' \
  --extra-arg=-idirafter$$(dirname $$($(CXX) -print-file-name=include/omp.h))
lint-tidy: develop
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(TIDY_BUILD) -GNinja \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" \
	  -DTORCHMOE_BUILD_PYTHON=ON -DTORCHMOE_BUILD_EMULATION=ON \
	  -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=12 \
	  > $(TIDY_BUILD).log 2>&1 || { cat $(TIDY_BUILD).log; exit 1; }
	@echo "clang-tidy"; find $(TIDY_BUILD) -name 'unity_*.cxx' | xargs -n 1 -P $(JOBS) \
	  $(BIN)/clang-tidy -p $(TIDY_BUILD) --quiet $(TIDY_OPENMP) 2> >(grep -v 'warnings generated' >&2)

# On a machine with nvcc, whatever torch it has: every kernel for the oldest and the newest GPU that has code of its own, and the
# adapters against torch's CUDA headers, which every build of torch carries.
CUDA_CHECK := $(BUILD)/cuda-check
CUDA_INCLUDES = -I csrc $$($(BIN)/python -c 'from torch.utils.cpp_extension import include_paths; print(*(f"-isystem {p}" for p in include_paths()))')
cuda-check: $(VENV)/.complete  ## Compile the CUDA backend where nvcc is found, warnings as errors
	@if ! command -v nvcc > /dev/null; then echo "cuda-check: skipped, nvcc is not on the PATH"; exit 0; fi; \
	mkdir -p $(CUDA_CHECK); includes="$(CUDA_INCLUDES) -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE -std=c++20"; \
	echo "cuda-check: nvcc, sm_80 and sm_90a"; \
	printf '%s\n' $(CUDA_FILES) | xargs -P $(JOBS) -I {} sh -c 'nvcc '"$$includes"' -O3 --expt-relaxed-constexpr \
	  -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror -Xptxas=-warn-spills,-warn-lmem-usage,-Werror \
	  -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
	  -c {} -o $(CUDA_CHECK)/$$(basename {}).o' && \
	echo "cuda-check: the adapters" && \
	printf '#include "%s"\n' $(CUDA_ADAPTERS:csrc/%=%) > $(CUDA_CHECK)/adapters.cpp && \
	$(CXX) $$includes $$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^.*INCLUDES="-I\([^"]*\)".*/-isystem \1/p') \
	  -O1 -Wall -Wextra -Wpedantic -Werror -fopenmp -fsyntax-only $(CUDA_CHECK)/adapters.cpp

# In copies, of which those with changed C++ are built.
additions: develop  ## Count the files that an addition of each kind touches, and run its tests (ARGS="--help")
	$(BIN)/python tests/additions/count_additions.py --run $(ARGS)

# ---- Document ----------------------------------------------------------------------------------------------------------------

SITE := $(BUILD)/docs
SPHINX = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m sphinx -W --keep-going -q -d $(BUILD)/doctrees

# A tutorial runs again when its text has changed.
docs: develop doxygen  ## Build the documentation site in build/docs, its tutorials executed
	$(SPHINX) docs $(SITE)
	@echo "make: $(SITE)/index.html"

tutorials:  ## Run every tutorial again, and build the site
	rm -rf docs/gallery
	$(MAKE) docs

# What the extra `browser` names is for this alone.
browse: docs  ## Open every page of the site in Chromium, phone and desktop; pictures in build/browser
	@command -v chromium > /dev/null || { echo "make: this needs the Debian package chromium; as root: apt-get install chromium"; exit 1; }
	@$(PIP) "$$(sed -n 's/^browser = \["\(.*\)"\]$$/\1/p' pyproject.toml)"
	$(BIN)/python tests/browser/read_site.py --site $(SITE) --out $(BUILD)/browser $(ARGS)

.PHONY: doxygen
doxygen: | system
	@command -v doxygen > /dev/null || { echo "make: this needs the Debian package doxygen; as root: apt-get install doxygen"; exit 1; }

# ---- Release -----------------------------------------------------------------------------------------------------------------

# The library calls nothing of Python's, so that one wheel serves every version; it is one torch's. auditwheel leaves torch's own
# libraries to torch, OpenMP's among them, and states the oldest Linux that the wheel runs on.
DIST := dist
wheel: $(VENV)/.complete  ## Write the source and a wheel for this torch to dist/
	@rm -rf $(BUILD)/wheel
	@mkdir -p $(DIST)
	CMAKE_ARGS= TORCHMOE_CUDA=OFF PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --outdir $(BUILD)/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' \
	  --wheel-dir $(DIST) $(BUILD)/wheel/*.whl
	cp $(BUILD)/wheel/*.tar.gz $(DIST)

# The environment has what a user's has, and the tests nothing but the wheel's files.
test-wheel: wheel  ## Install the source archive, then run with the wheel every test that needs no build
	$(PYTEST) tests/python/test_wheel.py -m release
	$(PYTHON) -m venv --clear $(BUILD)/wheel/venv
	$(BUILD)/wheel/venv/bin/python -m pip install --quiet '$(TORCH)' "$$(ls -t $(CURDIR)/$(DIST)/*.whl | head -n 1)[train,bench]" \
	  expecttest hypothesis markdown-it-py pytest pytest-xdist setuptools
	OMP_WAIT_POLICY=PASSIVE $(BUILD)/wheel/venv/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not cuda and not needs_build and not study"

# Hours; goes on where it was stopped. build/certificates has what was found.
certificates: develop  ## Ask every law of every reported bug, and of the correct layers over 20 seeds
	PYTHONPATH=tests/python $(BIN)/python -m certify.sweep mutants
	PYTHONPATH=tests/python $(BIN)/python -m certify.sweep correct --seeds 20

support: build-tests  ## Run every test and note in docs/support.md what they ran with
	$(BIN)/python tests/support.py compiled
	$(MAKE) test
	$(BIN)/python tests/support.py tested

# Another torch, Python or compiler has a copy of the sources, an environment and a build of its own:
# make support-copy TORCH=torch==2.11.0 PYTHON=python3.12 CXX=clang++-16
COPY := $(BUILD)/copies/$(subst ==,-,$(TORCH))-$(notdir $(PYTHON))-$(notdir $(CXX))
test-torch: copy  ## Run every test with another torch, in a copy (TORCH=torch==2.11.0)
	$(MAKE) -C $(COPY) test
wheel-torch: copy  ## Write a wheel for another torch to dist/ (TORCH=torch==2.11.0)
	$(MAKE) -C $(COPY) wheel DIST='$(CURDIR)/$(DIST)'
support-torch: copy  ## The same as support with another torch, Python or compiler (TORCH=... PYTHON=... CXX=...)
	$(MAKE) -C $(COPY) support SUPPORT='$(CURDIR)/docs/support.json'
copy:
	@mkdir -p $(COPY)
	@find $(COPY) -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -rf {} +
	@git ls-files -z --cached --others --exclude-standard | { xargs -0 stat --printf '%n\0' 2> /dev/null; true; } | \
	  xargs -0 cp --parents --preserve=timestamps -t $(COPY)

format: $(VENV)/.complete  ## Format everything
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove what was built (the environment stays: rm -r .venv)
	rm -rf $(BUILD) python/torchmoe/*.so python/torchmoe/_build.py python/torchmoe/include python/torchmoe/share
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
