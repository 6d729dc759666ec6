# A thin face over the `llamamem` command and pytest. `make demo` or `make test` on a fresh clone does all the rest.

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
LLAMAMEM := $(BIN)/llamamem
CXX_OURS  = $(wildcard patches/src/*.c patches/src/*.cpp patches/src/*.h patches/src/*.cu tests/native/*.cpp tests/native/*.h tests/fuzz/*.cpp cmake/*.cpp)

.PHONY: help setup python build demo test test-gpu test-native test-python test-reference lint types format bench fuzz vendor-verify clean distclean

# what is shared, the environment and the build, is made once; the closing lines stay pytest's
.NOTPARALLEL:
# half a model is none
.DELETE_ON_ERROR:

help:
	@echo "make setup   the environment in .venv and the native build"
	@echo "make demo    a small model answers with live memory"
	@echo "make test-reference   the PyTorch reference against recorded logits and against the server (installs PyTorch)"
	@echo "make test    lint, types, native tests, Python tests"
	@echo "make test-gpu   the op, whole models and a server on the GPU, with the CUDA build"
	@echo "make fuzz    both readers of sidecars against hostile files, SECONDS=60 each (needs clang)"
	@echo "make lint | types | format | bench | vendor-verify | clean | distclean"

setup: python build

# -- the environment: each stamp is a step that is not repeated until what it depends on changes

python: $(VENV)/.package $(VENV)/.bindings

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# again where a package is new: the editable install has a list of them. By the environment: pip of Debian 12 has no -C
$(VENV)/.package: pyproject.toml $(wildcard llamamem/*/__init__.py llamamem/*/*/__init__.py) | $(VENV)/.venv
	SKBUILD_CMAKE_DEFINE=LLAMAMEM_NATIVE=OFF $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The bindings come from the pinned sdist, by hash, with nothing compiled: never a second, stock llama.cpp.
$(VENV)/.bindings: vendor/llama.cpp.lock $(VENV)/.package
	$(BIN)/python -m llamamem.native.vendor requirement > $(VENV)/bindings.txt
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		--no-binary llama-cpp-python --require-hashes --requirement $(VENV)/bindings.txt
	@touch $@

# -- the native runtime: `llamamem build` knows when there is nothing to do

build: python
	$(LLAMAMEM) build

demo: setup
	$(LLAMAMEM) demo

# 0.8 GB of random weights in the layer shape of Gemma 4 E4B, made once, and the same as Q4_K_M
WIDE := build/bench/wide

$(WIDE).gguf: tools/make_model.py | $(VENV)/.package
	mkdir -p $(@D)
	$(BIN)/python tools/make_model.py --preset wide --output $@ --sidecar $(WIDE)-memory.gguf

$(WIDE)-q4_k_m.gguf: $(WIDE).gguf | build
	"$$($(LLAMAMEM) build)/bin/llama-quantize" --allow-requantize $< $@ Q4_K_M > $@.log 2>&1
	$(LLAMAMEM) sidecar rebind $(WIDE)-memory.gguf --base $@ --output $(WIDE)-q4_k_m-memory.gguf

bench: setup $(WIDE).gguf $(WIDE)-q4_k_m.gguf
	$(LLAMAMEM) bench --model $(WIDE).gguf --sidecar $(WIDE)-memory.gguf $(BENCH)
	$(LLAMAMEM) bench --model $(WIDE)-q4_k_m.gguf --sidecar $(WIDE)-q4_k_m-memory.gguf $(BENCH)

# each reader for so long
SECONDS ?= 60

fuzz: python
	$(BIN)/python tools/fuzz.py --seconds $(SECONDS)

# -- checks; pytest comes last, its summary closes the log

test: lint types test-native test-python

test-native: python
	dir=$$($(LLAMAMEM) build --tests) && $(BIN)/ctest --test-dir "$$dir" --output-on-failure --no-tests=error

test-python: python
	$(LLAMAMEM) build --tests > /dev/null
	$(BIN)/python -m pytest

# PyTorch, which nothing else needs, comes into the environment with the first run
test-reference: $(VENV)/.reference
	$(LLAMAMEM) build --tests > /dev/null
	$(BIN)/python -m pytest tests/reference

$(VENV)/.reference: $(VENV)/.bindings
	SKBUILD_CMAKE_DEFINE=LLAMAMEM_NATIVE=OFF $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,reference]'
	@touch $@

# the op on every GPU, then whole models and a server; each is skipped by name where there is no GPU
test-gpu: python
	dir=$$($(LLAMAMEM) build --backend cuda --tests) && \
		$(BIN)/ctest --test-dir "$$dir" --output-on-failure --no-tests=error -R "gpu|cuda" -V && \
		LLAMAMEM_BIN_DIR="$$dir/bin" $(BIN)/python -m pytest tests/gpu -v

lint: python
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_OURS)

types: python
	$(BIN)/mypy

format: python
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CXX_OURS)

vendor-verify: python
	$(LLAMAMEM) vendor verify

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV) vendor/llama.cpp
