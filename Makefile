# `make demo` and `make test` set up everything they need, each in a folder of its own; a second run starts at once.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
VENV4 := .venv-transformers4
EXTRAS := hf,peft,report,triton,test,dev
# diffusers asks for a newer huggingface_hub than transformers 4.57 allows.
EXTRAS_MAIN := $(EXTRAS),diffusers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-main test-transformers4 native-sanitize native-arm lint format bench docs clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo    set up $(VENV) and run the demo: the shipped model in every format, a table and kbit-demo/report.html"
	@echo "make test    set up, then run every test; the transformers tests also against transformers 4.57"
	@echo "make native-sanitize   the CPU kernels' tests with the address and undefined behaviour sanitizers of gcc"
	@echo "make native-arm        compile the CPU kernels for ARM and run their check under qemu"
	@echo "make lint    ruff and mypy"
	@echo "make bench   benchmarks (figures count on a GPU)"
	@echo "make docs    user guide and API reference in ./site"
	@echo "make clean   caches and outputs; make distclean also the environments"

# $(1): environment folder, $(2): constraints file, $(3): extras. torch goes first: it is the one package whose build (CPU, CUDA)
# depends on the index, and everything after it has to accept the build that is there.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "kbit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say which: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(1); $(PYTHON) -m venv $(1); } || { \
	  rm -rf $(1); \
	  echo "could not create $(1); on Debian and Ubuntu the venv module is the package python3-venv" >&2; exit 1; }
	$(1)/bin/python -m pip install --quiet -c $(2) torch
	$(1)/bin/python -m pip install --quiet -c $(2) -e ".[$(3)]"
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,$(EXTRAS_MAIN))

$(VENV4)/.installed: pyproject.toml constraints-transformers4.txt
	$(call install,$(VENV4),constraints-transformers4.txt,$(EXTRAS))

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

setup: $(VENV)/.installed

demo: $(VENV)/.installed
	$(VENV)/bin/kbit demo

test: test-main test-transformers4

test-main: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal

test-transformers4: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest -n $(JOBS) --dist worksteal -m transformers

# The sanitizers' allocator also serves torch, so that a kernel cannot read or write beyond a tensor unnoticed.
native-sanitize: $(VENV)/.installed
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 CXX=g++ \
	KBIT_NATIVE_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1" \
	$(VENV)/bin/python -m pytest -p no:xdist -q tests/kernels/test_cpu_quantize.py tests/kernels/test_cpu_linear_8bit.py \
	  tests/kernels/test_cpu_linear4bit.py tests/ops/test_group.py tests/optim/test_native.py

# ARM: what the compiler accepts, and what comes out, on any machine with g++-aarch64-linux-gnu and qemu-user.
ARM_CXX ?= aarch64-linux-gnu-g++
native-arm:
	$(PYTHON) tests/kernels/native/check.py --cxx "$(ARM_CXX)" --machine aarch64 --run "qemu-aarch64 -L /usr/aarch64-linux-gnu"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.run

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf site build dist kbit-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kbit tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(VENV4)
