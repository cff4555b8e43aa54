# From a fresh clone, with git, make and Python 3.11 or newer:  make demo   or   make test
# Everything is installed into .venv; `make setup PYTHON=/path/to/python3` chooses the interpreter.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$python && break; done)
BIN := .venv/bin
READY := .venv/.installed
# Tests never reach for the network, and one thread makes their numbers the same everywhere.
OFFLINE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(OFFLINE) $(BIN)/python -m pytest
# Processes that share the tests: one a core, at most four; one where there is a GPU, whose memory they would share.
WORKERS ?= $(shell command -v nvidia-smi >/dev/null && echo 1 || echo $$(n=$$(nproc 2>/dev/null || echo 1); \
	[ $$n -gt 4 ] && n=4; echo $$n))

.PHONY: help setup demo test check format bench

help:
	@echo "make demo     compare methods on the model inside the package, offline, in minutes"
	@echo "make test     every check and every test that this machine can run"
	@echo "make check    style, types and the layout of the house"
	@echo "make format   rewrite the sources in the house's style"
	@echo "make bench    what can be measured, and how"
	@echo "make setup    only install into .venv"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "thriftune needs Python 3.11 or newer with venv and ensurepip (on Debian: the" \
		"package python3-venv). None was found as python3.11, python3.12, python3.13 or python3." \
		"Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "installing into .venv with $(PYTHON); the first time takes a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: setup
	$(BIN)/thriftune demo

test: setup check
	$(PYTEST) -n $(WORKERS) --dist worksteal

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) tests/layout

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench:
	@echo "Each script in benchmarks/ measures one thing and writes a record to benchmarks/results/:"
	@for script in $(wildcard benchmarks/*/run.py); do echo "  $(BIN)/python $$script --help"; done
