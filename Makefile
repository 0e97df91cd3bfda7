# `make demo` and `make test` work on a fresh machine: they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
LLAMA_CPP ?= .venv-llama-cpp
TUNIX ?= .venv-tunix
TPU ?= .venv-tpu
GPU ?= .venv-gpu
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint dist-check clients-check tpu-check gpu-check docs notebooks quality install install-dev hooks clean

help:  ## say what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-14s %s\n", $$1, $$2 }'

demo: install  ## prune the bundled model on the bundled text and print the table
	$(BIN)/spap prune examples/llama-stories --sparsity 0.3 \
	  --data examples/stories_calibration.txt --sequences 128 --sequence-length 256 \
	  --eval examples/stories_evaluation.txt --output out/llama-stories-30 \
	  $(if $(wildcard out/llama-stories-30),--overwrite)

# Compilation dominates the time and uses one core, so the test files are distributed over the cores, in order.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: install-dev  ## run the tests that are not marked slow
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: install-dev  ## run the whole test suite
	SPAP_FUZZ=18 $(BIN)/python $(PYTEST)

lint: install-dev  ## ruff and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

dist-check: install-dev  ## build the archives in dist/ and run some of the tests against the installed wheel
	.ci/dist_check $(BIN)/python

# llama.cpp and Tunix have separate environments, which the first run creates.
clients-check: install-dev $(LLAMA_CPP)/.installed $(TUNIX)/.installed  ## run pruned models in llama.cpp and train them in Tunix
	$(BIN)/python -m pytest tests/checkpoint/test_llama_cpp.py --llama-cpp-python $(LLAMA_CPP)/bin/python
	$(BIN)/python -m pytest tests/checkpoint/test_tunix.py --tunix-python $(TUNIX)/bin/python

# So have the compilers for TPUs and GPUs, which need no such device.
tpu-check: install-dev $(TPU)/.installed  ## compile programs of a run for a TPU slice that is not there
	$(TPU)/bin/python -m pytest tests/planning/test_tpu.py

gpu-check: install-dev $(GPU)/.installed  ## compile programs of a run for a GPU server that is not there
	$(GPU)/bin/python -m pytest tests/planning/test_gpu.py

docs: install-dev  ## build the pages as a site in out/docs; any warning is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs out/docs
	@echo out/docs/index.html

notebooks: install-dev  ## run the notebooks of examples/ in place
	$(BIN)/python tests/examples/test_notebooks.py

quality: install  ## compare the methods on the bundled model, the quick way
	$(BIN)/python -m benchmarks.quality --quick

install: $(VENV)/.installed  ## set up .venv with what users need
install-dev: $(VENV)/.installed-dev  ## set up .venv with what contributors need

hooks: install-dev  ## run ruff before every commit from now on
	$(BIN)/pre-commit install

# An environment without pip, or of a Python that is too old, is made anew.
USABLE := $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null

$(VENV)/.installed: pyproject.toml
	$(USABLE) || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(USABLE) || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.installed

# The llama.cpp environment uses the packages of .venv, so it is rebuilt whenever .venv is.
$(LLAMA_CPP)/.installed: .ci/llama_cpp $(VENV)/.installed-dev
	.ci/llama_cpp $(LLAMA_CPP) $(BIN)/python
	touch $@

$(TUNIX)/.installed: .ci/tunix $(VENV)/.installed-dev
	.ci/tunix $(TUNIX) $(BIN)/python
	touch $@

$(TPU)/.installed: .ci/compiler $(VENV)/.installed-dev
	.ci/compiler $(TPU) tpu $(BIN)/python
	touch $@

$(GPU)/.installed: .ci/compiler $(VENV)/.installed-dev
	.ci/compiler $(GPU) cuda12 $(BIN)/python
	touch $@

clean:  ## remove the environments, the archives and all output
	rm -rf $(VENV) $(LLAMA_CPP) $(TUNIX) $(TPU) $(GPU) build dist out *.egg-info
