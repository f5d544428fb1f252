# make demo and make test do everything on a fresh machine: environment, build, run.
PYTHON ?= python3
# Any torch >= 2.10 works; this one is what CI runs.
TORCH ?= torch==2.13.0
VENV ?= .venv
# The tested versions of all other packages. Empty: the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
INSTALL := pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py splade_fast/_version.py
CPP := $(shell find csrc tests/cpp tests/emulation examples/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: env build packages libraries demo demo-scratch recipe test test-all test-cpp test-python test-latest emulate emulate-races \
	emulate-memory lint format docs sanitize fuzz \
	fuzz-drawn fuzz-guided kill-test wheel bench bench-compare clean

env: $(VENV)/.environment
build: $(VENV)/.built

$(VENV)/.environment: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13" wheel
	touch $@

# Packages are installed while the compiler works.
$(VENV)/.built: $(VENV)/.environment $(SOURCES)
	$(MAKE) --jobs=2 --output-sync=target packages libraries
	touch $@

packages: $(VENV)/.environment
	SPLADE_FAST_BUILD=0 $(INSTALL) --no-build-isolation -e ".[demo,test,bench,docs,dev]"

# Ninja uses all cores. It warns of a jobserver that it cannot use.
NINJA_ALONE := env -u MAKEFLAGS
libraries: $(VENV)/.environment
	$(NINJA_ALONE) python setup.py --quiet build_ext --inplace

demo: build
	python -m examples.docstrings $(ARGS)

recipe: build
	python -m examples.docstrings.recipe $(ARGS)

demo-scratch: build
	python -m examples.docstrings.scratch $(ARGS)

test: test-cpp test-python

# Every combination of parameters, of which make test takes every pair; an hour or more.
test-all: export TEST_ALL := 1
test-all: export EMULATION_CASES := 200
test-all: test

# In the folder of make build, so that nothing is compiled twice.
test-cpp: build
	cmake -S . -B build/editable -DSPLADE_FAST_PYTHON=OFF -DSPLADE_FAST_TESTS=ON
	$(NINJA_ALONE) cmake --build build/editable
	ctest --test-dir build/editable --output-on-failure
	cmake --install build/editable --prefix build/cpp-installed
	cmake -S examples/cpp -B build/example -G Ninja \
		-DCMAKE_PREFIX_PATH="$(CURDIR)/build/cpp-installed;$$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	$(NINJA_ALONE) cmake --build build/example
	ctest --test-dir build/example --output-on-failure

# One worker for each core, and one thread in each worker: the tests are many and small.
WORKERS ?= $(shell nproc)
test-python: build
	$(NINJA_ALONE) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# The Python tests in a new environment with the newest versions of all packages.
test-latest:
	rm -rf .venv-latest
	$(MAKE) test-python VENV=.venv-latest CONSTRAINTS=

# The CUDA kernels on the CPU, a fiber per thread: more cases of what make test runs a few of.
EMULATION_CASES ?= 200
emulate: build
	EMULATION_CASES=$(EMULATION_CASES) python -m pytest tests/emulation $(ARGS)

# The same under ThreadSanitizer, which finds races between threads and between blocks, and under AddressSanitizer and
# UBSan, which find wrong accesses: many times slower, so fewer cases.
SANITIZED_CASES ?= 4
emulate-races: build
	EMULATION_CASES=$(SANITIZED_CASES) python -m tests.emulation.sanitized thread tests/emulation $(ARGS)

emulate-memory: build
	EMULATION_CASES=$(SANITIZED_CASES) python -m tests.emulation.sanitized address tests/emulation $(ARGS)

lint: build
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CPP)

format: build
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

docs: build
	python -m benchmarks report
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# The tests of the ops with the CPU library under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize: build
	tests/sanitize.sh address $(ARGS)
	tests/sanitize.sh thread $(ARGS)

# Other inputs in every round, with the library under AddressSanitizer and UBSan: what hypothesis draws, and for each
# target what libFuzzer finds by coverage, which needs Clang 15 or later.
FUZZ_MINUTES ?= 10
CLANG ?= $(notdir $(firstword $(shell which $(foreach version,22 21 20 19 18 17 16 15,clang++-$(version)) clang++)))
fuzz: fuzz-drawn $(if $(CLANG),fuzz-guided)
	@test -n "$(CLANG)" || echo "Left out: make fuzz-guided, which needs Clang (Debian 12: clang-19, libclang-rt-19-dev)."

fuzz-drawn: build
	FUZZ_PROFILE=long FUZZ_MINUTES=$(FUZZ_MINUTES) tests/sanitize.sh address tests/fuzz $(ARGS)

fuzz-guided: build
	$(INSTALL) --no-build-isolation -e ".[fuzz]"
	CLANG=$(CLANG) FUZZ_MINUTES=$(FUZZ_MINUTES) tests/sanitize.sh coverage $(ARGS)

# Training killed at random times has to resume to the bytes of a run that was not.
kill-test: build
	python -m tests.training.kill $(ARGS)

# A wheel for every Linux whose C library is as old as this machine's; torch's libraries stay torch's.
wheel: build
	rm -rf dist
	python -m build --no-isolation --outdir dist/here
	auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist dist/here/*.whl

bench: build
	python -m benchmarks $(ARGS)

bench-compare: build
	rm -rf build/benchmarks
	python -m benchmarks $(ARGS) --out build/benchmarks
	python -m benchmarks compare benchmarks/results build/benchmarks

clean:
	rm -rf build dist site docs/benchmarks docs/benchmarks.md *.egg-info splade_fast/*.so $(VENV) .venv-latest
