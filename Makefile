# Needs Python 3.11.4 or later and make; the first target that needs it installs everything else into .venv.
PYTHON ?= python3
# To build on packages that are there already, such as a torch for this machine's GPU:
#   make test VENV_FLAGS=--system-site-packages CONSTRAINTS=
VENV_FLAGS ?=
CONSTRAINTS ?= constraints.txt
# Test processes: `make test WORKERS=0` runs in this one, for a debugger
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
READY := .venv/ready
RUN_DEMO := $(BIN)/qprune run data=synthetic budget=smoke order=prune_first

.DEFAULT_GOAL := help
.PHONY: help demo test faults attacks results check bench bench-gpu docs fmt clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 14

demo: $(READY) ## train both networks through every phase, offline on synthetic data; ends with a result row (1 minute)
	$(RUN_DEMO) task=cifar
	$(RUN_DEMO) task=espcn

test: $(READY) ## run the tests; tests on real data need QPRUNE_DATA; ARGS="-k plan" picks
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

faults: $(READY) ## kill, fuzz and starve runs for some twenty minutes, and print the figures; ARGS="-k kill" picks
	QPRUNE_FAULTS=long $(BIN)/python -m pytest -n $(WORKERS) tests/faults $(ARGS)

attacks: $(READY) ## answer hostile archives, names, files and signals, some 2,000 of them, and print the counts; ARGS="-k names" picks
	QPRUNE_ATTACKS=100 $(BIN)/python -m pytest -n $(WORKERS) tests/attacks $(ARGS)

results: $(READY) ## train the missing ESPCN rows on real data (hours; resumes), then tables, figures and report
	scripts/reproduce.sh $(ARGS)

check: $(READY) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy has no package map: link the tree as it is installed
	rm -rf .venv/typing && mkdir -p .venv/typing/qprune
	ln -s $(CURDIR)/qprune/* $(CURDIR)/tasks $(CURDIR)/configs .venv/typing/qprune/
	ln -s $(CURDIR)/bench $(CURDIR)/tests $(CURDIR)/pyproject.toml .venv/typing/
	cd .venv/typing && ../bin/mypy -p qprune -p bench -p tests

bench: $(READY) ## measure what training costs (25 minutes) into results/bench.md; ARGS="cifar espcn" picks sections
	@$(BIN)/python -c 'import qsparse' 2>/dev/null || $(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m bench $(ARGS)

bench-gpu: $(READY) ## measure MobileNetV2 on a GPU, into the same file
	$(BIN)/python -m bench gpu $(ARGS)

docs: $(READY) ## build the documentation into build/docs; warnings are errors
	MPLCONFIGDIR=$(CURDIR)/build/matplotlib $(BIN)/python -m sphinx -W -n --keep-going -q -b html docs build/docs

fmt: $(READY) ## format the code and apply ruff's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv, caches and builds; runs in results/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "qprune needs Python 3.11.4 or later: make PYTHON=python3.12 ...")'
	@echo "installing into .venv; torch is large, so this takes a few minutes"
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	@touch $@
