# make demo: set up a fresh machine and ask the numerals model about files of four kinds.
# make test: set up a fresh machine and run the quick tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data/numerals
PLUGINS := image video audio point_cloud numerals
READY := $(VENV)/ready

.PHONY: demo test test-slow lint numerals

demo: $(READY)
	$(BIN)/python -m xblip_numerals.demo --out build/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not weights"

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu and not weights"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

numerals: $(READY)
	$(BIN)/python -m xblip_numerals.build --data $(DATA) --out build/numerals --install

$(READY): pyproject.toml constraints.txt $(PLUGINS:%=plugins/%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=compat \
		--editable .[test,ray] $(PLUGINS:%=--editable plugins/%) --editable plugins/numerals[build]
	touch $@
