# Every task of the project. CI and people call the same targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo up test test-fast test-radosgw faults nemesis lint fmt migrate migration compose-check bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*?## "} {printf "  make %-15s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install everything, pinned

# pip and not uv: uv does not read pip's configuration, and so resolves torch to another build than the machine offers.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## Run the main job on the embedded stack: submit, train, browse, download, merge
	$(BIN)/python -m demo

up: setup ## Start the embedded stack (Ctrl-C stops it)
	$(BIN)/lora-depot up

# Two at a time, a file each: most of the time of a test is spent waiting for the processes it started.
test: setup ## Run every test against real Postgres, Valkey and S3
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: setup ## Run the tests of one room: make test-fast ROOM=registry
	$(BIN)/python -m pytest -x -q tests/$(ROOM)

test-radosgw: setup ## Run the storage conformance suite against Debian's radosgw (installs it; needs root)
	.ci/radosgw.sh

faults: setup ## Break every part of the service on purpose, every way there is a test for
	$(BIN)/python -m pytest -m "faults_long or not faults_long" tests/faults

nemesis: setup ## Random faults for minutes, then a full check: make nemesis SEED=1 MINUTES=10
	NEMESIS_SEED=$(SEED) NEMESIS_MINUTES=$(or $(MINUTES),10) $(BIN)/python -m pytest -s -m faults_long tests/faults/test_nemesis.py

lint: setup ## Check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

migrate: setup ## Bring the database that DEPOT_DATABASE_URL names to the newest schema
	$(BIN)/alembic upgrade head

migration: setup ## Write a migration from the models: make migration MESSAGE="add x"
	$(BIN)/alembic revision --autogenerate -m "$(MESSAGE)"

compose-check: ## Validate docker-compose.yml (needs the compose command, no engine)
	.ci/compose-check.sh

bench: setup ## Run one benchmark and write bench/results/<name>.json: make bench NAME=merge
	$(BIN)/python -m bench.$(NAME)

clean: ## Remove the environment and caches, never data
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
