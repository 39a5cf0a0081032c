# Each target sets itself up in .venv; `make help` lists them.
#   make demo PYTHON=python3.12      another interpreter (3.10 or newer)
#   make test ARGS='-m "not slow"'   arguments for pytest; -n 0 for one process, as --pdb wants it
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
RUN    := $(VENV)/installed
DEV    := $(VENV)/installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test lint format readme bench-data bench-step clients clean

help:           ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo: $(RUN)    ## tune a tiny LLaMA on examples/facts.csv on the CPU and ask it before and after
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: $(DEV)    ## every test, on the CPU, offline
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(DEV)    ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(RUN)  ## put the flags and the map of the code into docs/
	$(BIN)/python .ci/readme.py

bench-data: $(DEV)  ## rows per second of the data path
	$(BIN)/python benchmarks/bench_data.py $(ARGS)

bench-step: $(DEV)  ## tokens per second of the training step
	$(BIN)/python benchmarks/bench_step.py $(ARGS)

clients: $(RUN) ## two small models in the programs that people use next (llama.cpp, vLLM, …), each in an environment of its own
	nice $(BIN)/python benchmarks/clients.py $(ARGS)

clean:          ## remove .venv and what the demo wrote
	rm -rf $(VENV) demo_output clients_output

# The stamps are newer than the requirements they installed, so nothing is installed twice.
$(RUN): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, this is %s. Name one: make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

$(DEV): $(RUN) requirements-optional.txt requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt -r requirements-optional.txt
	@touch $@
