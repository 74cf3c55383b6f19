# demo | test | test-all | lint | docs | bench | clean
#
# The first target makes .venv and installs what it needs; later ones find it made. With VENV=/path/to/venv an
# environment that exists already is used: the package is not installed into it, only what it lacks.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# The package comes from this tree, whichever tree the environment was made for.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export MPLBACKEND ?= Agg
# Two test workers with one thread each; the demo and the benchmarks take what the machine has.
lint types pytest pytest-all docs: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types pytest pytest-all docs bench clean given-environment

help:
	@echo "make demo      learn how many tokens a Vision Transformer can drop, on real images (minutes)"
	@echo "make test      lint, types, tests and docs (under 15 minutes on two cores)"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff"
	@echo "make docs      build the documentation into site/"
	@echo "make bench     run every script in benchmarks/"
	@echo "make clean     remove what the other targets made, .venv too"

ifeq ($(origin VENV),file)
ENVIRONMENT := $(VENV)/.stamp-dev
else
ENVIRONMENT := given-environment
endif

# Our own: made once, and again when the dependencies change.
.venv/.stamp-dev: setup.cfg pyproject.toml
	@echo "==> environment: making .venv and installing (once, some minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try make PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) --editable '.[dev]'
	@touch $@

# Somebody's: other trees may use it too, so nothing in it changes unless something is missing.
given-environment:
	@test -x $(PY) || { echo "==> environment: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@lacks=$$($(PY) .ci/missing.py) || exit 1; \
	    test -z "$$lacks" || { echo "==> environment: installing $$lacks"; $(PIP) $$lacks; }

demo: $(ENVIRONMENT)
	@echo "==> demo: examples/demo.py"
	@$(PY) examples/demo.py

test: lint types pytest docs
	@echo "==> test: passed"

test-all: lint types pytest-all docs
	@echo "==> test-all: passed"

lint: $(ENVIRONMENT)
	@echo "==> lint: ruff check, ruff format --check"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(ENVIRONMENT)
	@echo "==> types: mypy"
	@$(PY) -m mypy lightning_hpo $(wildcard examples/*.py benchmarks/*.py)

# Tests that share an expensive fixture carry the mark `xdist_group` and run in one worker.
pytest: $(ENVIRONMENT)
	@echo "==> tests and doctests: all but slow and gpu"
	@$(PY) -m pytest -q -n $(WORKERS) --dist loadgroup -m "not slow and not gpu"

pytest-all: $(ENVIRONMENT)
	@echo "==> tests and doctests: all"
	@$(PY) -m pytest -q -n $(WORKERS) --dist loadgroup

docs: $(ENVIRONMENT)
	@echo "==> docs: mkdocs build --strict, into site/"
	@$(PY) -m mkdocs build --quiet --strict

bench: $(ENVIRONMENT)
	@for script in $$(grep -l __main__ benchmarks/*.py); do \
	    echo "==> bench: $$script"; $(PY) $$script || exit 1; \
	done

clean:
	@echo "==> clean: .venv, caches, build, site, demo_output"
	@rm -rf .venv build dist site demo_output *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
