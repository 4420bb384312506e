# make run: the main job, once. make test: what a change must pass. Both make .venv first.
#   TORCH=cpu      take PyTorch's CPU build from PyTorch's own index
#   PYTHON=...     the interpreter for .venv

SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)) python3)
TORCH ?= default
TARGET ?= targets/nano-cpu.toml
BIN := .venv/bin
PINS := pyproject.toml constraints/torch.txt scripts/setup.py

.PHONY: help run setup setup-dev test test-slow test-gpu soak checks format lock bench preflight
.DEFAULT_GOAL := help

help:
	@echo "make run         the main job: reference, golden record, bitwise engine, training, a reply"
	@echo "make test        the tests (make test-slow: the slow ones; make test-gpu: those for a GPU)"
	@echo "make soak        200 kills of training runs, which must end with the same weights"
	@echo "make checks      formatting, lint, types"
	@echo "make format      format and fix what can be fixed"
	@echo "make bench       how long collecting and aligning take"
	@echo "make setup       make .venv (make setup-dev: with what tests need)"
	@echo "make preflight   look at what this machine has"
	@echo "make lock        pin the dependencies anew (needs uv)"

run: setup
	$(BIN)/forgetrain run $(TARGET)

setup: .venv/run.stamp
setup-dev: .venv/dev.stamp

.venv/run.stamp: constraints/run.txt $(PINS)
	@$(PYTHON) scripts/setup.py run --torch $(TORCH)

.venv/dev.stamp: constraints/dev.txt $(PINS)
	@$(PYTHON) scripts/setup.py dev --torch $(TORCH)

preflight:
	@$(PYTHON) scripts/setup.py --check

# Slow tests that kill processes at chosen moments, or count seconds: one after the other, with nothing beside them. All
# others run two at a time, of which each takes work from the other when it has none.
ALONE := $(addprefix tests/,forge/test_kills.py judge/test_ledger.py soak \
	train/test_bad_input.py train/test_command.py train/test_peers.py)

# A file's tests stay together: what they share, collected records and whole runs, is made once.
test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup-dev
	$(BIN)/python -m pytest -m "slow and not gpu" --durations 15 -n 2 --dist worksteal $(addprefix --ignore ,$(ALONE))
	$(BIN)/python -m pytest -m "slow and not gpu" --durations 15 $(ALONE)

soak: setup-dev
	$(BIN)/python -m tests.soak.soak --kills 100 --ranks 1
	$(BIN)/python -m tests.soak.soak --kills 100 --ranks 2

test-gpu: setup-dev
	$(BIN)/python -m pytest -m gpu

checks: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python bench/align.py

lock:
	@$(PYTHON) scripts/lock.py
