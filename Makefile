PYTHON ?= python3
DEMO_DIR ?= runs/miniature
DEMO_FLAGS ?=
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test ablation lint clean

# PyPI's torch brings gigabytes of CUDA libraries. Machines without a GPU are spared them by
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, whose 2.13.0+cpu pip prefers.
$(BIN)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m miniature.demo --output_dir $(DEMO_DIR) $(DEMO_FLAGS)

test: $(BIN)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

ablation: $(BIN)/.installed
	$(BIN)/python eval/ablation.py --output_dir runs/ablation $(ABLATION_FLAGS)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs build dist *.egg-info
