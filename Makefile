PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
COMPAT := 5.0.0 5.12.1 5.23.0
LAWS := tests/test_laws.py tests/test_generate.py tests/test_attach.py tests/test_kernels.py tests/test_tap.py

.PHONY: demo test lint types tests compat bench clean

demo: $(VENV)/.installed  ## the main job on the embedded model
	$(BIN)/vlmflow demo

test: lint types tests  ## everything that must hold before a change lands

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed
	$(BIN)/basedpyright --pythonpath $(BIN)/python

tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

compat: $(COMPAT:%=compat-%)  ## the engine's laws on the oldest, a middle and the newest transformers

compat-%: $(VENV)-compat-%/.installed
	$(<D)/bin/python -m pytest -n auto --dist worksteal $(LAWS)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.PRECIOUS: $(VENV)-compat-%/.installed
$(VENV)-compat-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -v '^transformers==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --constraint $(@D)/constraints.txt --editable ".[dev]" transformers==$*
	touch $@

bench: $(VENV)/.installed  ## the speed of pruning on this processor, and docs/performance.md's tables and picture
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/report.py

clean:
	rm -rf $(VENV) $(COMPAT:%=$(VENV)-compat-%) build dist
