PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
COMPAT := 5.0.0 5.12.1 5.23.0
LAWS := tests/engine tests/families tests/models/test_checkpoints.py

SAMPLE ?= 200
SEED ?= 0

.PHONY: demo test lint types tests fuzz mutants compat lmms bench results pages gpu pico clean

demo: $(VENV)/.core  ## the main job on the embedded model, in an environment of the package and what it needs to run
	@echo "The embedded model answers twenty questions under every method: about a minute."
	@$(BIN)/vlmflow demo
	@echo
	@echo "Ask it yourself:"
	@echo "  $(BIN)/vlmflow run --image sample:0 --prompt \"what color is the rook?\" --compare"

test: lint types tests  ## everything that must hold before a change lands

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/typos

types: $(VENV)/.installed
	$(BIN)/basedpyright --pythonpath $(BIN)/python

tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

fuzz: $(VENV)/.installed  ## seeded cases of bad input: each works or is refused in a line, at once, with no half-written file
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.fuzz --cases 500

mutants: $(VENV)-mutants/.installed  ## a seeded sample of small faults in the source, which the tests must notice
	$(<D)/bin/python -m tests.mutants.run --rooms core,pruners,engine --sample $(SAMPLE) --seed $(SEED)
	$(<D)/bin/python -m tests.mutants.run --rooms flow,evaluate --sample $(SAMPLE) --seed $(SEED)

$(VENV)-mutants/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]" mutmut==3.8.1
	touch $@

compat: $(COMPAT:%=compat-%)  ## the engine's laws and whole checkpoints on the oldest, a middle and the newest transformers

compat-%: $(VENV)-compat-%/.installed
	$(<D)/bin/python -m pytest -n auto --dist worksteal $(LAWS)

lmms: $(VENV)-lmms/.installed  ## that lmms-eval measures what our runner does, in an environment of its own
	$(<D)/bin/python -m pytest tests/plugins/test_lmms.py

# lmms-eval brings a torchvision for CUDA, which cannot be imported beside a torch for the CPU; nothing here needs it
$(VENV)-lmms/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable ".[lmms-eval]" beartype datasets pytest pytest-timeout
	$(@D)/bin/python -c "import torchvision" 2>/dev/null || $(@D)/bin/pip uninstall --quiet --yes torchvision
	touch $@

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "Installing vlmflow and what it needs into $(VENV), most of it torch: a minute or two, and the time to download it."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.PRECIOUS: $(VENV)-compat-%/.installed
$(VENV)-compat-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -v -E '^(transformers|tokenizers)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --constraint $(@D)/constraints.txt --editable ".[dev]" transformers==$*
	touch $@

bench: $(VENV)/.installed  ## the speed of pruning on this processor, and docs/performance.md's tables and picture
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m docs.make.performance

results: $(VENV)/.installed  ## what pruning does to the embedded model: docs/results.md
	$(BIN)/python -m bench.results
	$(BIN)/python -m docs.make.results

pages: $(VENV)/.installed  ## the pages alone, from the files that were measured
	$(BIN)/python -m docs.make.performance
	$(BIN)/python -m docs.make.results

pico: $(VENV)/.installed  ## train the embedded model from nothing, or go on; then ship it and score it: hours
	$(BIN)/python -m recipes.pico.train
	$(BIN)/python -m recipes.pico.export
	$(BIN)/python -m recipes.pico.score_card
	$(BIN)/python -m docs.make.results

gpu: $(VENV)/.installed  ## proofs and figures on a GPU, and their part of docs/performance.md
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m docs.make.performance

clean:
	rm -rf $(VENV) $(VENV)-lmms $(VENV)-mutants $(COMPAT:%=$(VENV)-compat-%) build dist
