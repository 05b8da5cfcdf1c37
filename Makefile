# make demo: the operators and a small pipeline on this machine. make test: lint and tests without a GPU. Both set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(shell find csrc -type f)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard build_backend/*.py) $(CSRC)

.PHONY: demo test test-gpu lint

demo: .venv/installed
	$(BIN)/python -m univid.demo

test: lint
	$(BIN)/python -m pytest

test-gpu: .venv/installed-test
	$(BIN)/python -m pytest -m gpu

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

# The tests check how the CUDA kernels compile, on machines without CUDA too.
ifeq ($(shell uname -s),Linux)
test test-gpu lint: export UNIVID_BUILD_CUDA ?= 1
endif

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: $(SOURCES) | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[generate]"
	touch $@

.venv/installed-test: $(SOURCES) | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]"
	touch .venv/installed $@
