# Two commands are enough on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

# Without their dependencies: their wheels pin other builds of torch, and what they need of the rest is here.
ZOO := torchvision==0.28.0 timm==1.0.31
PEERS := rebasin==0.0.47 torch-pruning==1.6.1 torchview==0.2.7 graphviz==0.21

.PHONY: demo test test-federated lint types layers unit study study-structure study-routes study-peers study-transformers study-laws bench bench-peers bench-full-size format clean

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

test-federated: $(VENV)/.dev  ## minutes: runs with Flower's own programs, which are killed on the way
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow tests/test_flower_programs.py

study: $(VENV)/.dev        ## hours: trains the study's networks, writes docs/results
	$(BIN)/python studies/train_networks.py
	$(BIN)/python studies/gamf_defaults.py --out docs/results/gamf-defaults.jsonl
	$(BIN)/python studies/gamf_defaults.py --out docs/results/gamf-defaults.jsonl --table docs/results/gamf-defaults.md
	$(BIN)/python studies/repairs_study.py --out docs/results/repairs.jsonl
	$(BIN)/python studies/repairs_study.py --out docs/results/repairs.jsonl --table docs/results/repairs.md
	$(BIN)/python studies/auto_choice.py --out docs/results/auto-choice.jsonl
	$(BIN)/python studies/auto_choice.py --out docs/results/auto-choice.jsonl --table docs/results/auto-choice.md
	$(BIN)/python studies/guard_study.py --out docs/results/guard.jsonl
	$(BIN)/python studies/guard_study.py --out docs/results/guard.jsonl --table docs/results/guard.md
	$(BIN)/python studies/main_job.py --out docs/results/main-job.jsonl
	$(BIN)/python studies/main_job.py --out docs/results/main-job.jsonl --table docs/results/main-job.md
	$(BIN)/python studies/toolbox_study.py --out docs/results/toolbox.jsonl
	$(BIN)/python studies/toolbox_study.py --out docs/results/toolbox.jsonl --table docs/results/toolbox.md
	$(BIN)/python studies/widths_study.py --out docs/results/widths.jsonl
	$(BIN)/python studies/widths_study.py --out docs/results/widths.jsonl --table docs/results/widths.md
	$(BIN)/python studies/size_study.py --out docs/results/size.jsonl
	$(BIN)/python studies/size_study.py --choice --out docs/results/size-choice.jsonl
	$(BIN)/python studies/size_study.py --out docs/results/size.jsonl --choices docs/results/size-choice.jsonl \
		--page docs/results/size.md
	$(BIN)/python studies/structure_fuzz.py --networks 10000 --out docs/results/structure-fuzz.jsonl \
		--page docs/results/structure-fuzz.md

study-structure: $(VENV)/.dev  ## minutes: captures every architecture of studies/zoo.py, writes docs/supported-architectures.md
	$(BIN)/python studies/structure_study.py --out docs/results/structure.jsonl --page docs/supported-architectures.md

study-routes: $(VENV)/.dev  ## minutes: captures every architecture by both routes, writes docs/results/structure-routes.md
	$(BIN)/python studies/structure_routes.py --out docs/results/structure-routes.jsonl --page docs/results/structure-routes.md

study-peers: $(VENV)/.dev  ## minutes: what other tools find in the same networks, writes docs/results/structure-peers.md
	$(BIN)/python -m pip install --quiet --no-deps $(PEERS)
	$(BIN)/python studies/structure_peers.py --out docs/results/structure-peers.jsonl --page docs/results/structure-peers.md

study-transformers: $(VENV)/.dev  ## an hour: trains pairs of transformers, writes docs/results/transformer-pairs.md
	$(BIN)/python studies/transformers_pairs.py --settings --tasks python-gpt2 --out docs/results/transformer-pairs-settings.jsonl
	$(BIN)/python studies/transformers_pairs.py --out docs/results/transformer-pairs.jsonl
	for name in transformer-pairs transformer-pairs-settings; do $(BIN)/python studies/transformers_pairs.py \
		--out docs/results/$$name.jsonl --table docs/results/transformer-pairs.md || exit 1; done

study-laws: $(VENV)/.dev   ## minutes: every method and repair against every law, writes docs/results/laws.md
	$(BIN)/python studies/laws_table.py --out docs/results/laws.jsonl
	$(BIN)/python studies/laws_table.py --out docs/results/laws.jsonl --table docs/results/laws.md

bench: $(VENV)/.dev        ## minutes: speed and memory, as ratios within one run
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-columns=median,iqr,rounds --benchmark-sort=name

bench-peers: $(VENV)/.dev  ## minutes: speed beside rebasin, a whole affinity matrix and lapx, writes docs/results/peers.md
	$(BIN)/python -m pip install --quiet --no-deps $(PEERS) lapx==0.11.1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py --out docs/results/peers.jsonl

bench-full-size: $(VENV)/.dev  ## ten minutes: time and memory of every method, writes docs/results/full-size.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/full_size.py --out docs/results/full-size.jsonl
	$(BIN)/python benchmarks/full_size.py --out docs/results/full-size.jsonl --table docs/results/full-size.md

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[data,report]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt Makefile
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(ZOO)
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis
