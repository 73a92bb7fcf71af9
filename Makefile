PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
PYTEST := -m pytest --numprocesses=logical --maxprocesses=4

# Where this is set, each of the hundred processes that the tests start would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-newest test-oldest check lint types pytest real bench clean

run: $(STAMP)  ## generate a text with the bundled pair of models
	$(BIN)/ssd-ray generate --temperature 0.7 --max-tokens 200 $(if $(PROMPT),"$(PROMPT)")

# Types, for which one core is enough, are looked at while the tests begin; what fails keeps none from running.
test: $(STAMP)  ## everything that needs neither a GPU nor much time
	$(MAKE) --no-print-directory --keep-going --jobs=2 lint types pytest

# No constraints here: uv picks the versions, and obeys its environment variables (UV_TORCH_BACKEND=cpu, UV_CONSTRAINT=FILE).
test-newest: RESOLUTION = highest
test-oldest: RESOLUTION = lowest-direct
test-newest test-oldest: test-%:  ## the fast tests with the newest, or the oldest, versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --no-input --disable-pip-version-check --quiet uv
	$(VENV)-$*/bin/uv pip install --python $(VENV)-$*/bin/python --resolution $(RESOLUTION) -e '.[dev]'
	$(VENV)-$*/bin/python $(PYTEST) -m "not gpu and not slow and not ray" $(PYTEST_ARGS)

check: lint types  ## what can be seen without running anything

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

real: $(STAMP)  ## tests on real models: SSD_RAY_REAL_MODELS=target,draft:other-target make real
	$(BIN)/python -m pytest tests/real -m real $(PYTEST_ARGS)

bench: $(STAMP)  ## compare ssd, sd and ar on the bundled pair
	$(BIN)/ssd-ray bench

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find actors cluster ssd_ray tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)
