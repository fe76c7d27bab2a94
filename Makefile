# Everything a contributor runs. Each target works from a clean clone, twice, and in any order:
# the environment is made by the stamp below and remade when a dependency changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.leibler-installed
BENCH := $(VENV)/.leibler-bench-installed
# The first interpreter that is new enough; `make PYTHON=/path/to/python test` overrides the search.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
# Two workers with one thread each beat one worker with two threads, and do not oversubscribe a small machine.
WORKERS ?= 2
PYTEST_ARGS ?=

export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup demo test test-slow lint bench soak docs verify clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; pass it as make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and alone: its build (CPU or CUDA) is the machine's choice, the rest adapts to it
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	@touch $@

setup: $(STAMP)  ## make the environment in .venv

demo: $(STAMP)  ## train and distil small models from nothing, and write a report
	$(BIN)/leibler demo

test: $(STAMP)  ## tests and docstring examples (fast ones)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests that take more than a few seconds
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(PYTEST_ARGS)

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check src tests $(wildcard examples benchmarks)
	$(BIN)/ruff format --check src tests $(wildcard examples benchmarks)
	$(BIN)/pyright

$(BENCH): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(BENCH)  ## measured comparisons, both sides printed
	@for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

soak: $(STAMP)  ## faults injected into runs, and every recipe for many steps; one table
	$(BIN)/python tests/soak/run.py

docs: $(STAMP)  ## the site, in site/
	$(BIN)/mkdocs build --strict

verify: $(STAMP)  ## the fast claims
	$(BIN)/leibler verify

clean:  ## remove what the targets made, except the environment
	rm -rf site build dist demo .pytest_cache .ruff_cache .hypothesis
