# `make demo` runs the main job end to end on the CPU; `make test` passes the tests.
# Both make .venv first, and need nothing but Python >= 3.11 and the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version with a CPU build; a looser pin may pull gigabytes of CUDA packages.
TORCH := torch==2.13.0
# Extra flags for pip, such as another package index.
PIP_FLAGS ?=

.PHONY: demo test test-long clean

demo: $(VENV)/demo.stamp
	rm -rf demo && mkdir demo
	$(BIN)/dsv4 convert --hf examples/tiny-dsv4 --out demo/packed
	$(BIN)/dsv4 validate demo/packed --source examples/tiny-dsv4
	$(BIN)/dsv4 run demo/packed --raw --prompt "$$(printf 'class Stack:\n    def __init__(self):')" \
		--max-new-tokens 80 --temperature 0.6 --top-p 0.9 --seed 1

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m "not long"

test-long: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet $(PIP_FLAGS) $(TORCH) -e .
	touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet $(PIP_FLAGS) $(TORCH) -e ".[test]"
	touch $@ $(VENV)/demo.stamp
