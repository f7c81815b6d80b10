# narseal: everything that a newcomer needs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export UV_PROJECT_ENVIRONMENT := $(VENV)
export UV_COMPILE_BYTECODE := 1
# bytecode halves the start of every process that the tests start
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve dev test lint format fuzz mutants bench docs tools vectors clean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(READY) ## run narseal on a sample cache, or in front of UPSTREAM=https://cache.nixos.org
	@$(BIN)/python examples/serve.py $(if $(UPSTREAM),--upstream $(UPSTREAM)) $(if $(PUBLIC_KEY),--public-key $(PUBLIC_KEY))

dev: $(READY) ## set up the development environment in .venv

test: $(READY) tools lint ## everything: lint, types, layers, all tests in JOBS=2 processes, and what they cover
	@data=$$(mktemp -d) && chmod 1777 $$data && export COVERAGE_FILE=$$data/data; \
	$(BIN)/coverage run -m pytest -n $(or $(JOBS),2) --dist loadfile --durations=10; code=$$?; \
	$(BIN)/coverage combine --quiet; echo "coverage of lines and branches, in all and below 80 %:"; \
	$(BIN)/coverage report | awk '/^(Name|TOTAL)/ || / [0-9]?[0-9]%$$/ && $$NF + 0 < 80'; \
	rm -rf $$data; exit $$code

lint: $(READY) ## ruff, mypy --strict, the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/serve.py
	$(BIN)/lint-imports

format: $(READY) ## let ruff write the code's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(READY) tools ## fuzz every parser of untrusted input and both sockets for MINUTES=n (10)
	@$(BIN)/uv sync --quiet --frozen --inexact --group fuzz
	$(BIN)/python -m tests.fuzz $(or $(MINUTES),10)

mutants: $(READY) tools ## seed each bug of tests/mutants.toml; a test must see it
	$(BIN)/python -m tests.tools.mutants

bench: $(READY) tools ## ratios against nginx, and the programs NCPS= and HARMONIA= name, from one run
	@$(BIN)/uv sync --quiet --frozen --inexact --group bench
	$(BIN)/python -m tests.bench

docs: $(READY) ## check that the documentation names every setting, command, metric and threat
	$(BIN)/pytest tests/unit/test_docs.py

tools: $(READY) ## install what the tests need: Debian's packages, real Nix and cosign, Sigstore
	$(BIN)/python -m tests.tools.debian
	$(BIN)/python -m tests.tools.sigstore.build

vectors: tools ## make tests/vectors anew with real Nix
	$(BIN)/python -m tests.tools.vectors

clean: ## remove what make made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml uv.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv $(VENV); }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv sync --quiet --frozen --inexact
	@touch $@
