# make demo and make test work on a fresh machine: they set themselves up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint dist-check docs notebooks quality install install-dev clean

demo: install
	$(BIN)/spap prune examples/llama-stories --sparsity 0.3 \
	  --calibration examples/stories_calibration.txt --sequences 256 --sequence-length 256 \
	  --eval examples/stories_evaluation.txt --output out/llama-stories-30 --overwrite

# Compiling takes most of the time and one core: files are spread over the cores, in their order.
test: install-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

dist-check: install-dev
	.ci/dist_check $(BIN)/python

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

clean:
	rm -rf $(VENV) build dist out *.egg-info
