# Each command sets itself up in .venv; a second run reuses what the first one built.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt
EDITABLE := $(INSTALL) --no-build-isolation --config-settings=build-dir=build/core --editable
# Without site's hooks, of which the editable installation is one: see sanitize.
PACKAGES = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
CORE := CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.PHONY: help demo test test-all develop lint bench sanitize wheel docs clean

help:
	@echo 'make demo      train one model under four optimizers; a report with pictures (no torch)'
	@echo 'make test      the test suite'
	@echo 'make test-all  what is too heavy for make test'
	@echo 'make develop   only the set-up: everything in .venv, the package editable'
	@echo 'make lint      ruff, mypy, import-linter, clang-format'
	@echo 'make bench     how fast a step is, beside torch'
	@echo 'make sanitize  the core under the address and undefined-behaviour sanitizers'
	@echo 'make wheel     a wheel in dist/, and the suite over it'
	@echo 'make docs      the documentation as a site in build/site'
	@echo 'make clean     remove what make made, reports/ excepted'

demo: .venv/lab
	$(BIN)/ebbtide compare --out reports/demo

test: .venv/everything
	$(BIN)/pytest -n auto --dist loadfile -m 'not slow and not gpu'

test-all: .venv/everything
	$(BIN)/pytest -m 'slow and not gpu'

develop: .venv/everything

lint: .venv/everything
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: .venv/everything
	$(BIN)/ebbtide bench --growth --out reports/bench

sanitize: .venv/everything
	$(INSTALL) --no-build-isolation --no-deps --upgrade --target build/sanitize \
	  --config-settings=build-dir=build/sanitize-core \
	  --config-settings=cmake.define.EBBTIDE_SANITIZE=ON .
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize:$(PACKAGES) \
	  $(BIN)/python -S -m pytest -n auto --dist loadfile -m 'not slow and not gpu' \
	  --ignore tests/test_sweep_postgres.py tests

# The wheel is tried where nothing else of this clone is installed.
wheel: .venv/tools
	rm -rf dist
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/pip install -qq --constraint constraints.txt "$$(ls dist/*.whl)[lab,torch,dev]"
	build/wheel/bin/pytest -n auto --dist loadfile -m 'not slow and not gpu' tests

docs: .venv/tools
	$(INSTALL) zensical
	$(BIN)/zensical build

clean:
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# Set-up, in three stages, each marked by a file: the tools that build, the package with what the
# laboratory needs, and everything that the tests need. Python sources need no new installation.

.venv/lab: .venv/tools $(CORE)
	@echo 'Building the core and installing the laboratory ...'
	$(EDITABLE) '.[lab]'
	@touch $@

.venv/everything: .venv/tools $(CORE)
	@echo 'Building the core and installing torch and the test tools ...'
	$(EDITABLE) '.[lab,torch,dev]'
	@touch $@

.venv/tools: constraints.txt
	$(call need,$(PYTHON) -c 'import sys; assert sys.hexversion >= 0x030b0000',Python 3.11 or newer is needed (apt install python3, or PYTHON=...))
	$(call need,$(PYTHON) -c 'import venv; import ensurepip',Python's venv is missing: apt install python3-venv)
	$(call need,command -v $(CXX),the C++ compiler $(CXX) is missing: apt install g++)
	$(call need,$(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")',Python.h is missing: apt install python3-dev)
	$(PYTHON) -m venv .venv
	$(INSTALL) scikit-build-core nanobind cmake ninja
	@touch $@

# $(call need,TEST,MESSAGE): nothing where the test passes; else one line, and make ends with status 2.
need = $(if $(shell $(1) >/dev/null 2>&1 && echo yes),,$(error $(2)))
