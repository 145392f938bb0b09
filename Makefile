# Two commands, from an empty clone with Python >= 3.11 and a package index:
#   make demo    the quickstart search
#   make test    everything that continuous integration checks
# Each step of `make test` is a target too: format, lint, types, imports, tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test format lint types imports tests clean study-nsga2 study-kinds bench bench-cuda
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/mergeopt run examples/quickstart.yaml $(if $(wildcard runs/quickstart/run.db),--resume)

test: format lint types imports tests

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check

types: $(VENV)/.installed-dev
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-report=term

# Studies take minutes and are not part of `make test`; each rewrites its small result file under studies/results.
study-nsga2: $(VENV)/.installed
	$(BIN)/python studies/nsga2_vs_random.py

study-kinds: $(VENV)/.installed
	$(BIN)/python studies/three_kinds.py

# Benchmarks refuse to report where the machine is too busy to measure on; they rewrite tests/bench/results/DEVICE-NAME.json.
bench: $(VENV)/.installed
	$(BIN)/python tests/bench/record.py

bench-cuda: $(VENV)/.installed
	$(BIN)/python tests/bench/record.py --device cuda

clean:
	rm -rf $(VENV) .cache .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Stamp files: installed again only when what is installed has changed (an entry point is part of that).
$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "installing mergeopt and what it needs into $(VENV) ..."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "installing mergeopt, what it needs and the checkers into $(VENV) ..."
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mergeopt needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
