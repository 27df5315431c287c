# Each target makes what it needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers

.DEFAULT_GOAL := help
.PHONY: help demo test test-peers quality format generate docs bench bench-peers clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Weights to a streamed answer from a real Triton, on the CPU
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev ## Run the tests (no GPU; the package registry is the only network)
	$(BIN)/python -m pytest -n auto

test-peers: $(PEERS)/.peers ## Run the comparisons with PyTorch and transformers
	$(PEERS)/bin/python -m pytest tests/peers tests/test_forward.py tests/test_calibrate.py

quality: $(VENV)/.dev ## Check format, lint, types, import rules and generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate.py --check

format: $(VENV)/.dev ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(VENV)/.dev ## Write the generated files again
	$(BIN)/python scripts/generate.py

docs: $(VENV)/.dev ## Build the documentation's site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

bench: $(VENV)/.dev ## Run the benchmarks and write their results beside them
	$(BIN)/python benchmarks/convert_bf16.py
	$(BIN)/python benchmarks/convert_fp8.py
	$(BIN)/python benchmarks/calibrate.py
	$(BIN)/python benchmarks/cpu_runtime.py
	$(BIN)/python benchmarks/text_layer.py
	$(BIN)/python benchmarks/text_service.py
	$(BIN)/python benchmarks/cli_start.py
	$(BIN)/python benchmarks/store.py

bench-peers: $(PEERS)/.peers ## Run the benchmark against ModelOpt
	$(PEERS)/bin/python benchmarks/fp8_vs_modelopt.py

clean: ## Remove what the targets made
	rm -rf build dist $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.demo: pyproject.toml constraints.txt
	scripts/setup.sh $(PYTHON) $(VENV) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	scripts/setup.sh $(PYTHON) $(VENV) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(PEERS)/.peers: pyproject.toml constraints.txt constraints-peers.txt
	scripts/setup.sh $(PYTHON) $(PEERS) -c constraints.txt -c constraints-peers.txt -e '.[peers]'
	@touch $@
