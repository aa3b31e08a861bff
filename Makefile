# Everything starts from a fresh clone: the first target that needs the environment makes it.
# make PYTHON=python3.12 demo     chooses the interpreter of a new environment
# make demo ARGS="--help"         passes arguments on

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

help:  ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make the environment in .venv (done by the others when needed)

# The stamp is older than a changed pyproject.toml or constraints.txt, so a change installs again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	    "Python %d.%d found, 3.11 or newer needed: make PYTHON=/path/to/python3.11 ..." % v[:2])'
	@echo 'Installing into $(VENV): one to three minutes, about 2.5 GB'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## convert, distil and evaluate the small teacher of this repository; no GPU, no download
	$(BIN)/hrwkv demo --out demo $(ARGS)

test: lint  ## style, types and all tests
	$(BIN)/pytest $(PYTEST_ARGS) $(ARGS)

lint: $(STAMP)  ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put the files into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches; .venv, demo/ and runs/ stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
