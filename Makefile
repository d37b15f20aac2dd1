# One command each; every target sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)
# What calls the native CPU code; test_every_backend.py runs the sources of the others.
NATIVE_TESTS := tests/ops tests/bank/test_safe_bank.py --ignore=tests/ops/test_every_backend.py
CPP := $(shell find csrc tests/backends/native tests/backends/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOAK_MINUTES ?= 120
# pip compiles to bytecode on one core; compileall does on all of them, and while pip waits for the network. Where little
# is new, one core is faster (1.6 s, 11 on two). Its exit status does not count: some packages hold files for other Pythons.
PIP = $(BIN)/python -m pip install --quiet --no-compile
COMPILE = ($(BIN)/python -m compileall -qq $(if $(wildcard $(VENV)/.installed),,-j 0) $(VENV)/lib || true)
# Copies of the kernels for instructions that this CPU lacks cannot run: no coverage is asked of them.
lacks = $(if $(shell grep -m1 -ow $(1) /proc/cpuinfo),,--gcov-exclude-directories '.*_$(2)\.dir')
NOT_RUN = $(call lacks,avx2,avx2) $(call lacks,avx512bw,avx512) $(call lacks,avx512_vnni,avx512vnni)

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage coverage-python coverage-native sanitize arm mutants families fuzz soak bench lowest-bounds docs lint format gpu-check wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## create .venv, install dependencies, build the native module

# Without build isolation, so that the module is built against the torch that will run it and torch is fetched once.
$(VENV)/.installed: pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) 'setuptools>=77' wheel 'cmake>=3.25' ninja 'pybind11>=2.13' 'torch>=2.10' torchvision
	$(COMPILE) & $(PIP) --no-build-isolation --editable '.[dev]' && wait
	$(PIP) --no-deps 'nvidia-cutlass>=4.2'  # CuTe's headers, which tests compare with
	@$(COMPILE)
	@touch $@

demo: setup  ## pre-train a small CLIP, make it safe, show what changed (runs/demo)
	$(BIN)/python -m saferclip_fast.demo

test: setup  ## run the tests, a process for each core with one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

coverage: coverage-python coverage-native  ## lines run by the tests: the package (at least 90 %) and the CPU C++ (at least 85 %)

coverage-python: setup
	rm -rf build/coverage/python* && mkdir -p build/coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=
	$(BIN)/coverage report --fail-under=90

# The module is built apart, so that the one in use stays as it is. Counters are atomic: the kernels have threads.
coverage-native: setup
	rm -rf build/coverage/native && mkdir -p build/coverage/native
	CXXFLAGS='--coverage -fprofile-update=atomic' SAFERCLIP_FAST_CUDA=0 CMAKE_ARGS=-DSAFERCLIP_NATIVE_TESTS=ON \
	  $(BIN)/python setup.py --quiet build --build-lib build/coverage/native/package --build-temp build/coverage/native/module
	cp -r tests pyproject.toml build/coverage/native/package
	cd build/coverage/native/package && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -q -n auto $(NATIVE_TESTS)
	build/coverage/native/module/cmake/native_kernels
	$(BIN)/gcovr --config tests/backends/native/gcovr.cfg $(NOT_RUN)

# -O1: instrumented -O3 compiles for many minutes. Left out: what calls no native kernel, and what measures memory.
SANITIZED := not cuda and not triton and not gradcheck and not without_a_native and not memory and not mapped_not_read
sanitize: setup  ## the CPU kernels, alone and behind the ops, under AddressSanitizer and UndefinedBehaviorSanitizer
	CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer' SAFERCLIP_FAST_CUDA=0 \
	  CMAKE_ARGS='-DSAFERCLIP_CPU_OPTIMIZE=-O1 -DSAFERCLIP_NATIVE_TESTS=ON' $(BIN)/python setup.py --quiet build \
	  --build-lib build/sanitize/package --build-temp build/sanitize/module
	build/sanitize/module/cmake/native_kernels
	cp -r tests pyproject.toml build/sanitize/package
	cd build/sanitize/package && OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(abspath $(BIN))/python -m pytest -q -n auto -k '$(SANITIZED)' tests/ops tests/bank/test_safe_bank.py

# Needs g++-aarch64-linux-gnu and qemu-user (Debian's names).
arm: setup  ## the CPU kernels alone, cross-compiled for aarch64 and run by qemu
	$(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S tests/backends/native -B build/aarch64 \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/native_kernels

mutants: setup  ## faults put into the CPU kernels, each of which the op tests must find
	$(BIN)/python -m tests.backends.native.mutants

families: setup  ## every architecture of open_clip, made small: trained a step, exported, read back (docs/models.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.families

fuzz: setup  ## ten minutes of coverage-guided fuzzing of the file readers (inputs in build/fuzz)
	$(BIN)/python -m pip install --quiet 'atheris>=2.3'
	$(BIN)/python -m tests.system.fuzz.run --seconds 600

soak: setup  ## train for SOAK_MINUTES (120) and watch the memory (build/soak.json)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.system.soak --minutes $(SOAK_MINUTES) --json build/soak.json

bench: setup  ## time every op against PyTorch and others; goes on where it was (BENCH=--again: from the start)
	$(BIN)/python -c 'import faiss, numkong, threadpoolctl' 2>/dev/null || $(BIN)/python -m pip install --quiet faiss-cpu numkong threadpoolctl
	$(BIN)/python -m benchmarks.run $(BENCH)

# The package is read from here, its native module too: one module serves every torch from the lowest on.
lowest-bounds: setup  ## the main paths against the lowest version of every dependency, in a venv of their own (build/lowest)
	test -x build/lowest/bin/python || $(PYTHON) -m venv build/lowest
	$(BIN)/python -m tests.system.lowest_bounds > build/lowest/requirements.txt
	build/lowest/bin/python -m pip install --quiet --requirement build/lowest/requirements.txt
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -q tests/api tests/data/readers tests/models \
	  tests/train/test_train.py tests/evaluate tests/export

docs: setup  ## the docs as a site, with the API reference (build/site); any warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup  ## ruff, clang-format, codespell, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent --untyped-calls-exclude=torch examples

format: setup  ## format Python and C++ in place
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

gpu-check: $(if $(OFFLINE),,setup)  ## on a machine with a GPU, ten minutes: tests, compute-sanitizer, times (OFFLINE=1: no network)
	$(if $(OFFLINE),$(PYTHON),$(BIN)/python) -m benchmarks.gpu.check

wheel: setup  ## build a wheel into dist/ (SAFERCLIP_FAST_CUDA=0: without CUDA, 1: with it; default: where nvcc is)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove everything that make built, but not the runs
	rm -rf $(VENV) build dist *.egg-info saferclip_fast/_C.*.so .pytest_cache .ruff_cache .mypy_cache
