# gpt_dist: `make demo` shows all of it, `make test` tests all of it. Both install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := gpt_dist serve tests benchmarks
# Without compiled files each of hundreds of processes would compile what it imports.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Make .venv with exact versions of everything

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if (3, 11) <= v < (3, 14) else f"error: Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## Prepare text, train on 2 ranks, sample, serve, call
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

quick: install  ## Run the tests that need no process of their own: under 90 seconds
	$(BIN)/pytest -n 3 --dist worksteal -m "not slow and not cluster and not node"

# More workers than cores, because the longest tests mostly wait.
test: install  ## Run all tests (those that need Slurm, Node or Chromium skip where it is missing)
	$(BIN)/pytest -n 5 --dist worksteal

test-cluster: install  ## Install Slurm and iproute2 (as root), run the tests on a real cluster
	bash tests/cluster/setup.sh
	$(BIN)/pytest tests/cluster

check: lint test  ## Run what CI runs: lint, types, tests

lint: install  ## Check style, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

soak: install  ## Run the long versions of tests, results in benchmarks/results
	$(BIN)/python benchmarks/faults.py --kills 100 --json benchmarks/results/faults.json
	$(BIN)/python benchmarks/soak.py --json benchmarks/results/soak.json
	SOAK=1 $(BIN)/pytest tests/inference/test_speculation.py

proto: install  ## Generate the stubs from proto/
	PATH="$(CURDIR)/$(BIN):$$PATH" bash proto/generate.sh

docs: install  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

image-check: install  ## Build the Dockerfile with buildah (as root), train and serve inside
	bash launch/container/image-check.sh

format: install  ## Format the code and fix what can be fixed automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment, caches and build products (runs/ and data/ stay)
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo quick test test-cluster check lint soak proto docs image-check format clean
