# Two commands do everything on a fresh machine: `make demo` and `make test`. Python 3.11+, a C++ compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test test-fast sanitize check docs protos bench setup clean

# The environment: rebuilt when what it is made from changes. torch comes first and alone, so that no other package pulls a CUDA build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, but this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 " )'
	@command -v c++ >/dev/null || { echo "A C++ compiler is needed (hnswlib compiles on install). Debian: apt-get install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready ## install everything into .venv

demo: setup ## train, evaluate, build, serve and query the sample data
	$(BIN)/omni demo

test: setup ## all tests, on every core; those that need a program that is not installed skip and say so
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: setup ## the tests without those marked slow, on every core
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

sanitize: setup ## the C++ under address and undefined-behaviour sanitisers: index tests, and 5 minutes of fuzz a kernel
	scripts/sanitize.sh

check: setup ## formatting, lint, types, docstrings, fresh generated code and pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHON=$(abspath $(BIN))/python scripts/generate_protos.sh --check
	$(BIN)/python scripts/generate_command_reference.py --check

docs: setup ## the manual as a site, into site/; a broken link or an unknown name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

protos: setup ## generate the protobuf modules
	PYTHON=$(abspath $(BIN))/python scripts/generate_protos.sh

demo/model: | setup
	$(BIN)/omni demo

bench: demo/model ## the two quick benchmarks, on the demo's model and release; `omni bench --help` lists all
	$(BIN)/omni bench recall demo/model --engaged-queries 50
	$(BIN)/omni bench latency --store demo/store

clean:
	rm -rf build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
