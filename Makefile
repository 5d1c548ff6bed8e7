# One command each on a fresh machine: `make demo`, `make test`, `make lint`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(HOME)/.cache/qmoe_jax/xla

.PHONY: setup demo test fuzz faults check-real lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/tiny_end_to_end.py

test: setup
	$(BIN)/pytest -n 2

# Thousands of damaged checkpoints of every kind; about ten minutes.
fuzz: setup
	QMOE_FUZZ_EXAMPLES=1500 $(BIN)/pytest -n 2 tests/test_fuzz.py

# Compressions killed at 50 random moments, and a full disk at every write; about ten minutes.
faults: setup
	QMOE_FAULT_KILLS=50 QMOE_FAULT_EVERY=1 $(BIN)/pytest -n 2 tests/test_resume.py

# Needs the network; CHECKPOINT is a released switch-base-8.
check-real: setup
	$(BIN)/python examples/check_real.py $(CHECKPOINT) $(if $(VOCABULARY),--sentencepiece_model_file=$(VOCABULARY))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo_output
