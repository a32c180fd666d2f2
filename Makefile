# Every target sets up .venv by itself. `make help` lists them.

SHELL := /bin/sh
.DEFAULT_GOAL := help

PY := .venv/bin/python
STAMP := .venv/.installed
DEMO_MODEL := .cache/smollm2-135m-instruct
# Options for the program behind a target, e.g. make test ARGS="-k rope"
ARGS ?=
# Files of tests that run side by side; many of them start two to four processes of their own.
JOBS ?= 2

# Benchmarks that need no files of the user's; the others say in benchmarks/README.md what they want.
BENCHES := blend convert load redact

# Nothing is fetched after installation: models and data are files.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quickstart test check format bench demo-model soak clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml setup.py constraints.txt tools/find_python.sh tools/setup_venv.py
	@python=$$(PYTHON="$(PYTHON)" sh tools/find_python.sh) && "$$python" tools/setup_venv.py

setup: $(STAMP) ## Make .venv and install everything into it

quickstart: demo-model ## Train a real model on CPU and report what it learned (about 15 minutes)
	$(PY) tools/quickstart.py $(ARGS)

test: demo-model ## Run the tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(STAMP) ## Run ruff, mypy and import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo

format: $(STAMP) ## Format the code and mend what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: demo-model ## Run the benchmarks that need no files, or one: make bench BENCH=convert
	@set -e; for name in $(or $(BENCH),$(BENCHES)); do \
	    echo "benchmarks/$$name.py"; $(PY) "benchmarks/$$name.py" $(ARGS); \
	done

demo-model: $(STAMP) ## Write SmolLM2-135M-Instruct as a Hugging Face directory into .cache/
	@$(PY) tools/demo_model.py --output $(DEMO_MODEL)

soak: demo-model ## Run the long tests that `make test` leaves out
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -m soak --timeout 7200 $(ARGS)

clean: ## Remove caches and build outputs; .venv, .cache and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
