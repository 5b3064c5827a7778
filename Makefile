# make quickstart   environment, a small model tuned and exported, its answers: a few minutes, no network but pip
# make test         environment with the test tools, the test suite (10 to 20 minutes on 2 cores)
# make test-long    what takes longer: memory on large checkpoints, another transformers, compiling for TPUs, Beam
# make lint types   ruff, mypy

PYTHON ?= python3
VENV ?= .venv
RUN := runs/quickstart
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test test-long test-matrix test-plan test-beam lint types clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/installed

quickstart: $(VENV)/installed
	$(BIN)/python -m jaxtune.train configs/quickstart.yaml
	$(BIN)/python -m jaxtune.evaluate $(RUN)/hf --data builtin:quickstart/eval/examples.jsonl.gz \
	  --data builtin:quickstart/eval/phrasings.jsonl.gz --by task --json $(RUN)/accuracy.json
	$(BIN)/python -m jaxtune.generate $(RUN)/hf --prompts configs/quickstart_prompts.txt

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not long and not matrix and not plan and not beam"

test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m long
	$(MAKE) test-matrix
	$(MAKE) test-plan
	$(MAKE) test-beam

# Folders that we write, opened by other versions of transformers and peft in an environment of their own.
MATRIX := .venv-matrix
$(MATRIX)/installed: tests/matrix/requirements.txt
	$(PYTHON) -m venv $(MATRIX)
	$(MATRIX)/bin/python -m pip install --quiet -r $<
	touch $@

test-matrix: $(VENV)/installed-test $(MATRIX)/installed
	PYTHONPATH=tests JAX_PLATFORMS=cpu $(BIN)/python tests/matrix/write_folders.py build/matrix
	JAXTUNE_MATRIX_FOLDERS=build/matrix $(MATRIX)/bin/python -m pytest --confcutdir=tests/matrix -m matrix tests/matrix

# The training step compiled for TPUs that are not here; libtpu has an environment of its own.
PLAN := .venv-plan
$(PLAN)/installed: pyproject.toml
	$(PYTHON) -m venv $(PLAN)
	$(PLAN)/bin/python -m pip install --quiet --editable ".[plan]" pytest pytest-xdist
	touch $@

test-plan: $(PLAN)/installed
	$(PLAN)/bin/python -m pytest --numprocesses 2 --dist loadfile -m plan tests/cost_model tests/plan

# Windows made by Apache Beam, which has an environment of its own: with its protobuf SentencePiece models are not read.
BEAM := .venv-beam
$(BEAM)/installed: pyproject.toml
	$(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/python -m pip install --quiet --editable ".[beam]" pytest
	touch $@

test-beam: $(BEAM)/installed
	$(BEAM)/bin/python -m pytest -m beam tests/test_prepare_on_beam.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(MATRIX) $(PLAN) $(BEAM) build
