# Every target does its own set-up: .venv is made once, and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test test-long check bench format wheel clean

quickstart: $(STAMP)  ## raw text in, a chatting model out
	$(BIN)/groundup quickstart

test: $(STAMP)  ## every test but the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long"

test-long: $(STAMP)  ## every test, DeepSpeed's too, and the trials whose rows go to docs/reliability.md; again = go on
	$(BIN)/python -m pip install --quiet --editable ".[deepspeed]"
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)  ## what stands before every commit: style, types, layers, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long and not parity and not end_to_end and not costly"

bench: $(STAMP)  ## every comparison with a peer on this machine; rows go to docs/benchmarks.md
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	for name in startup generation data train_step compiling time_to_quality picture; do $(BIN)/python -m benchmarks.$$name || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# torch first: a plain `torch` pulled in by another package may bring gigabytes that a CPU does not need
$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache
