# make demo     install, align the shipped model, show before and after
# make test     install, run the tests (offline)
# A Python of yours: make demo PYTHON=/path/to/python3.11. An environment of yours: make test VENV=/path/to/env
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SETUP = $(if $(PYTHON),"$(PYTHON)" scripts/setup_env.py --venv "$(VENV)",@echo "tunelet needs Python 3.11 or newer (with venv): install one, or name it: make demo PYTHON=/path/to/python3.11" >&2; exit 2;)

.PHONY: demo install test lint install-parity build clean
.NOTPARALLEL:

demo: $(VENV)/.installed
	@$(BIN)/tunelet demo $(ARGS)

install: $(VENV)/.installed
	@$(BIN)/tunelet doctor

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/python -m ruff check .

# The peers that tests and benchmarks compare with; nothing in tunelet imports them.
install-parity: $(VENV)/.installed-dev-parity

$(VENV)/.installed: pyproject.toml scripts/setup_env.py
	@$(SETUP)

$(VENV)/.installed-dev: pyproject.toml scripts/setup_env.py
	@$(SETUP) --extra dev
	@touch "$(VENV)/.installed"

$(VENV)/.installed-dev-parity: pyproject.toml scripts/setup_env.py
	@$(SETUP) --extra dev --extra parity
	@touch "$(VENV)/.installed" "$(VENV)/.installed-dev"

build: $(VENV)/.installed
	@$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
