# Two commands are enough on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint types layers unit study bench format clean

demo: $(VENV)/.demo        ## install, then the main job on embedded data
	$(BIN)/weldnet demo -o demo

test: lint types layers unit  ## install, then every check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

layers: $(VENV)/.dev
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests src

study: $(VENV)/.dev        ## hours: trains the study's networks, writes docs/results
	$(BIN)/python studies/train_networks.py
	$(BIN)/python studies/gamf_defaults.py --out docs/results/gamf-defaults.jsonl
	$(BIN)/python studies/gamf_defaults.py --out docs/results/gamf-defaults.jsonl --table docs/results/gamf-defaults.md
	$(BIN)/python studies/main_job.py --out docs/results/main-job.jsonl
	$(BIN)/python studies/main_job.py --out docs/results/main-job.jsonl --table docs/results/main-job.md

bench: $(VENV)/.dev        ## minutes: speed and memory, as ratios within one run
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-columns=median,iqr,rounds --benchmark-sort=name

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[data]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis
