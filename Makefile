# make demo: set up a fresh machine and ask the numerals model about files of four kinds.
# make test: set up a fresh machine and run the quick tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data/numerals
PLUGINS := image video audio point_cloud numerals
READY := $(VENV)/ready
# Two processes of a thread each; left alone, each takes a thread of every core, and they wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
LMMS_VENV := build/lmms-venv
LMMS_READY := $(LMMS_VENV)/ready
LMMS_PIP := $(LMMS_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt \
	--config-settings editable_mode=compat

.PHONY: demo test test-slow test-lmms lint numerals

demo: $(READY)
	$(BIN)/python -m xblip_numerals.demo --out build/demo

test: $(READY)
	$(PYTEST) -m "not slow and not gpu and not weights and not lmms"

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu and not weights and not lmms"

test-lmms: $(LMMS_READY)
	$(LMMS_VENV)/bin/python -m pytest -m lmms tests/test_lmms.py tests/test_captions.py

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

numerals: $(READY)
	$(BIN)/python -m xblip_numerals.build --data $(DATA) --out build/numerals --install

$(READY): pyproject.toml constraints.txt $(PLUGINS:%=plugins/%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=compat \
		--editable .[test,ray,serve,ui] $(PLUGINS:%=--editable plugins/%) --editable plugins/numerals[build]
	touch $@

# An environment of its own: lmms-eval wants protobuf below 7. It wants av below 16 too, for models of its own; our videos want
# 18, which pip gives to what is installed later.
$(LMMS_READY): pyproject.toml constraints-lmms.txt $(PLUGINS:%=plugins/%/pyproject.toml)
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_PIP) --editable .[test,lmms]
	$(LMMS_PIP) av==18.1.0 $(PLUGINS:%=--editable plugins/%)
	touch $@
