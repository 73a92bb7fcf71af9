PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?= def fibonacci(n):
PYTEST_ARGS ?=

.PHONY: run test check bench clean

run: $(STAMP)  ## generate a text with the bundled pair of models
	$(BIN)/ssd-ray generate "$(PROMPT)"

test: check  ## everything that needs neither a GPU nor much time
	$(BIN)/python -m pytest -m "not gpu and not slow" $(PYTEST_ARGS)

check: $(STAMP)  ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## compare ssd, sd and ar on the bundled pair
	$(BIN)/ssd-ray bench

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find actors cluster ssd_ray tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)
