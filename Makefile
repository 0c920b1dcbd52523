# make demo   the whole product on the demo model, shown and stopped again
# make test   every test, one process a core (JOBS=n; ARGS="-n 0 -x tests/broker" for a part, in one process)
# make simulate           the cores of all parts in a simulated world, 1 000 seeds (SEEDS=n; SEED=17 replays one and tells its story)
# make simulate-planted   bugs put into the cores one at a time: does the simulation find them?
# make chaos  kills, freezes, cut connections and bad neighbours on a running stack; twenty minutes
# make lint   format, lint, types, import contracts
# make clean  remove what these made in this folder
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SEEDS ?= 1000
JOBS ?= $(shell nproc)
SIMULATE := PYTHONPATH=tests $(BIN)/python -m

.PHONY: demo test simulate simulate-planted chaos lint clean

# The application's side has neither torch nor transformers: the launcher builds the model's environment beside it.
$(VENV)/.server: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[server]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.server $@

demo: $(VENV)/.server
	$(BIN)/python configs/demo/show.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

simulate: $(VENV)/.dev
	$(SIMULATE) simulation $(or $(SEED),--seeds $(SEEDS) --jobs $(JOBS)) $(ARGS)

simulate-planted: $(VENV)/.dev
	$(SIMULATE) simulation.planting --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

chaos: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy client broker worker launcher loadtest tests/client/typed_application.py
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) build dist bench-results .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
