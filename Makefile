# `make demo` runs the main job end to end on the CPU; `make test` passes the tests.
# Both make .venv first, and need nothing but Python >= 3.11 and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux the usual index has torch with CUDA: 2.7 GB. torch's own index has it for the CPU.
TORCH := torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Extra flags for pip, such as another package index.
PIP_FLAGS ?=

.PHONY: demo test test-long check kernels-wheel clean

# How the demo asks its server: curl, or Python on a machine that has none.
ASK := $(if $(shell command -v curl),curl -sSf -d @-,$(BIN)/python -c 'import sys, urllib.request as \
	u; print(u.urlopen(sys.argv[1], sys.stdin.buffer.read()).read().decode())')
demo: $(VENV)/demo.stamp
	rm -rf demo && mkdir demo
	$(BIN)/dsv4 convert --hf examples/tiny-dsv4 --out demo/packed
	$(BIN)/dsv4 validate demo/packed --source examples/tiny-dsv4
	$(BIN)/dsv4 run demo/packed --raw --prompt "$$(printf 'class Stack:\n    def __init__(self):')" \
		--max-new-tokens 80 --temperature 0.6 --top-p 0.9 --seed 1
	@echo '$$ dsv4 serve demo/packed & curl .../v1/completions'
	@$(BIN)/dsv4 serve demo/packed --port 0 --quiet 2>demo/serve.log & server=$$!; \
		until url=$$(sed -n 's/^listening on //p' demo/serve.log 2>/dev/null) && test -n "$$url"; do \
			kill -0 $$server || { cat demo/serve.log; exit 1; }; sleep 0.2; done; \
		echo '{"prompt": "class Stack:", "max_tokens": 20, "temperature": 0}' \
			| $(ASK) $$url/v1/completions; \
		asked=$$?; echo; kill $$server; wait $$server && exit $$asked

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m "not long"

test-long: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2

# Lint, types and tests that take seconds: what is said and promised, names, numbers, the house.
FAST := tests/formats/numeric tests/docs/test_cli_reference.py tests/test_public_face.py \
	tests/test_house.py

check: $(VENV)/test.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy --no-error-summary
	$(BIN)/python -m pytest -n 2 -m "not long" -k "not lint_and_types and not runs_without" $(FAST)

# Wheels of compiled kernels, for GPU machines without a compiler: every shape of Flash and Pro,
# whole and with as many experts as the pruned releases have.
ARCH ?= sm_90a,sm_100a
EXPERTS ?= 104,160
kernels-wheel: $(VENV)/test.stamp
	$(BIN)/dsv4 kernels build --arch $(ARCH) --experts $(EXPERTS) --out build/kernels
	$(BIN)/dsv4 kernels wheel --arch $(ARCH) --from build/kernels --out dist

clean:
	rm -rf $(VENV) demo build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One try of a few seconds; where it fails, torch comes from the index that pip knows.
$(VENV)/torch.stamp: $(BIN)/python
	$(BIN)/pip install --quiet --no-deps --timeout 5 --retries 0 --index-url $(TORCH_INDEX) \
		$(PIP_FLAGS) $(TORCH) || \
		echo "no torch for the CPU from $(TORCH_INDEX); the usual index may bring CUDA, 2.7 GB"
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet $(PIP_FLAGS) $(TORCH) -e ".[all,serve]"
	touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet $(PIP_FLAGS) $(TORCH) -e ".[test]"
	touch $@ $(VENV)/demo.stamp
