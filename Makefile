# Every target sets up its own virtual environment on a fresh machine: `make demo` and `make test` are all there is to type.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
EXE := .exe
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt

# One worker for each core, which tests/conftest.py gives one thread each; idle workers take tests from busy ones.
JOBS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 15 --durations-min 1

.PHONY: demo test test-full test-mac clients check bench docs format clean help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.run  ## generate images from prompts and print where they are
	@$(BIN)/python recipes/demo.py

test: $(VENV)/.dev  ## all tests except the long ones
	$(PYTEST) -m "not long"

test-full: $(VENV)/.dev  ## all tests
	$(PYTEST)

test-mac: $(VENV)/.dev  ## tests that need a Mac, one after the other
	$(BIN)/python -m pytest -m mac -v -rs

clients: | $(BIN)/python$(EXE)  ## install what the studio's tests use: Debian's Chromium, and OpenAI's client for Node
	@sh tests/support/clients.sh $(VENV)/node

check: $(VENV)/.dev  ## lint, types, layers, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/generate.py --check

bench: $(VENV)/.dev  ## speed and memory compared with the reference, on this machine
	$(BIN)/python -m benchmarks

docs: $(VENV)/.dev  ## regenerate the generated pages
	$(BIN)/python docs/generate.py

format: $(VENV)/.dev  ## run the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis out

$(BIN)/python$(EXE):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python$(EXE)
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml relatives/pyproject.toml constraints.txt | $(BIN)/python$(EXE)
	$(PIP) -e '.[test,bench]' -e ./relatives
	@touch $@ $(VENV)/.run
