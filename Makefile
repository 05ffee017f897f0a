# `make demo` and `make test` set up everything they need in .venv; nothing else is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Other people's trainers, to measure against, in an environment of their own.
PEER := .venv-peer
# circuit-tracer wants an older transformers than they do.
CIRCUITS := .venv-circuits

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench miniature clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## install gemscope and its tools into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gemscope needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## evaluate the bundled dictionaries on the bundled model, offline
	$(BIN)/gemscope demo

test: $(STAMP)  ## lint, types, and the whole test suite
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q -m "not gpu and not weights"

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) $(PEER)/.installed $(CIRCUITS)/.installed  ## measure this machine, beside its peers; prints one record each
	$(BIN)/python benchmarks/run.py

$(PEER)/.installed:
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 natsort==8.4.0 schedulefree==1.4.1
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  eai-sparsify==1.3.3 dictionary-learning==0.1.0
	# Its pins are years old; with these it runs.
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  sae-dashboard==0.8.0 dataclasses-json==0.6.7 marshmallow==3.26.1 typing-inspect==0.9.0 \
	  mypy-extensions==1.2.0 eindex-callum==0.1.2
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check matplotlib einops
	@touch $@

$(CIRCUITS)/.installed:
	$(PYTHON) -m venv $(CIRCUITS)
	$(CIRCUITS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  circuit-tracer==0.5.0 torch==2.13.0 nnsight==0.6.3 transformer-lens==3.2.1 transformers==4.57.3
	@touch $@

miniature: $(STAMP)  ## make the bundled model and its dictionaries from scratch (hours; resumable)
	$(BIN)/python scripts/miniature/make.py --work build/miniature

clean:  ## remove what setup and runs made
	rm -rf $(VENV) $(PEER) $(CIRCUITS) build reports .pytest_cache .mypy_cache .ruff_cache
