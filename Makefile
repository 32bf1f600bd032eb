# Two commands matter: `make demo` and `make test`. Both create the environment on first use.
#
#   make demo            train a small comparison, print its leaderboard (about 5 minutes on 2 cores)
#   make test            lint, types and tests, as CI runs them
#   make test-all        the slow tests as well, and the GPU ones where there is a GPU
#   make gpu             check the Triton kernels on a card and time them (under 8 minutes)
#   make leaderboard     regenerate leaderboard.md from the published records
#   make docs            renew what README.md and docs/ say of the registry
#
# VENV=PATH uses (or creates) an environment elsewhere; the install takes about 6 GB.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.attention-zoo
DEMO := runs/demo
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all gpu lint format leaderboard readme docs clean

help: ## Say what there is
	@sed -n '1,11s/^# \{0,1\}//p' Makefile

# An environment is up to date for one checkout at one state of its metadata: the stamp says which.
install:
	@want="$(CURDIR) $$(cat pyproject.toml setup.py | sha256sum | cut -c1-16)"; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" != "$$want" ]; then \
	  echo "==> installing attention-zoo into $(VENV) (the first time takes minutes and about 6 GB)"; \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || exit 1; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' || exit 1; \
	  echo "$$want" > $(STAMP); \
	fi

# The protocol of the leaderboard in small: three rates at one seed, the best of them at two more,
# 30 runs of about 10 seconds of processor time each. A run that has its record is not repeated.
DEMO_SWEEP := recipe=mqar,digits attention=mha,linear,sliding_window

demo: install
	@echo "==> training mha, linear and sliding_window on two recipes, $(JOBS) runs at a time"
	@$(BIN)/zoo sweep leaderboard $(DEMO_SWEEP) --jobs $(JOBS) --runs $(DEMO) --records $(DEMO)/records
	@$(BIN)/zoo leaderboard --records $(DEMO)/records --output $(DEMO)/leaderboard.md --print

test: install lint
	@echo "==> running the tests"
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

test-all: install lint
	@echo "==> running all tests, the slow ones too"
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q -m "slow or not slow"

gpu: install
	@echo "==> checking the kernels on the card, then timing them"
	@$(BIN)/zoo kernels

lint: install
	@echo "==> ruff, mypy and the direction of imports"
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo > $(VENV)/imports.txt 2>&1 || { cat $(VENV)/imports.txt; exit 1; }

format: install
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

leaderboard: install
	@$(BIN)/zoo leaderboard

readme: install
	@$(BIN)/python -m zoo.docs.catalogue README.md

docs: readme
	@$(BIN)/python -m zoo.docs.compositions docs/compositions.md
	@$(BIN)/python -m zoo.docs.tower docs/architecture.md
	@$(BIN)/python -m zoo.bench.pages docs/performance.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
