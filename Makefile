# Everything runs in .venv, which is made from requirements.lock when either is new.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: quickstart test campaign soundness lint docs notebooks lock clean

quickstart: $(READY)  ## train the quickstart sweep and write its report
	$(BIN)/python -m experiments.sweep quickstart

test: $(READY)  ## the test suite, on two processes
	$(BIN)/python -m pytest -n 2

campaign: $(READY)  ## the tests and their long forms, on programs as XLA makes them for users
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 -m "campaign or not campaign"

soundness: $(READY)  ## how near errors come to their bounds in the campaign's cases, as a file and a figure
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 -m campaign tests/experiments/test_certificates.py tests/test_rounding.py \
	  --soundness docs/results/soundness

lint: $(READY)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check attention experiments configs

docs: $(READY)  ## the tables that are made from the registry
	$(BIN)/python -m experiments.tables

notebooks: $(READY)  ## execute the notebooks and keep their outputs
	$(BIN)/python -m experiments.notebooks

lock:  ## renew requirements.lock; needs uv
	uv pip compile pyproject.toml --universal --generate-hashes --no-annotate --no-header \
	  --extra experiments --group dev --upgrade -o requirements.lock

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

clean:  ## remove what can be made again
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
