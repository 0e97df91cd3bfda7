# `make demo` and `make test` work on a fresh machine: they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
LLAMA_CPP ?= .venv-llama-cpp
TPU ?= .venv-tpu
BIN := $(VENV)/bin

.PHONY: demo test lint dist-check clients-check tpu-check docs notebooks quality install install-dev clean

demo: install
	$(BIN)/spap prune examples/llama-stories --sparsity 0.3 \
	  --data examples/stories_calibration.txt --sequences 256 --sequence-length 256 \
	  --eval examples/stories_evaluation.txt --output out/llama-stories-30 \
	  $(if $(wildcard out/llama-stories-30),--overwrite)

# Compilation dominates the time and uses one core, so the test files are distributed over the cores, in order.
test: install-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

dist-check: install-dev
	.ci/dist_check $(BIN)/python

# llama.cpp has a separate environment, which the first run creates.
clients-check: install-dev $(LLAMA_CPP)/.installed
	$(BIN)/python -m pytest tests/checkpoint/test_llama_cpp.py --llama-cpp-python $(LLAMA_CPP)/bin/python

# The TPU compiler, which needs no TPU, has a separate environment too.
tpu-check: install-dev $(TPU)/.installed
	$(TPU)/bin/python -m pytest tests/planning/test_tpu.py

docs: install-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs out/docs
	@echo out/docs/index.html

notebooks: install-dev
	$(BIN)/python -m benchmarks.notebooks

quality: install
	$(BIN)/python -m benchmarks.quality --quick

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.installed

# The llama.cpp environment uses the packages of .venv, so it is rebuilt whenever .venv is.
$(LLAMA_CPP)/.installed: .ci/llama_cpp $(VENV)/.installed-dev
	.ci/llama_cpp $(LLAMA_CPP) $(BIN)/python
	touch $@

$(TPU)/.installed: .ci/tpu $(VENV)/.installed-dev
	.ci/tpu $(TPU) $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) $(LLAMA_CPP) $(TPU) build dist out *.egg-info
