# The commands of the project. `make help` lists them; each sets up .venv first if that is needed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv/bin
PYTEST := $(VENV)/python -m pytest
# For tests that share nothing: no cluster, no model.
SIDE_BY_SIDE := -n 2 --dist worksteal

# Python's bytecode cache makes every process of a run start seconds sooner; some containers switch it off.
export PYTHONDONTWRITEBYTECODE :=
# An interpreter other than python3: make setup PYTHON=python3.12. The set with CUDA: make setup TARGET=gpu
export PYTHON TARGET

.PHONY: help setup setup-dev demo test test-unit test-faults test-integration test-chaos fault-matrix chaos check bench quality docs lock clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with all that the program needs (minutes the first time, then nothing)
	@tools/setup_environment.sh run

setup-dev: ## the same, and what tests and checks need
	@tools/setup_environment.sh dev

demo: setup ## train the embedded model end to end; ARGS="run_name=two preference.total_steps=8" sets keys
	$(VENV)/python -m sgpo_dist train --config examples/demo.yaml $(ARGS)

test: setup-dev ## all tests: the units (seconds), seeded schedules and kills, then real Ray, vLLM and DeepSpeed (minutes)
	$(PYTEST) tests/unit $(SIDE_BY_SIDE)
	$(PYTEST) tests/simulation tests/crash $(SIDE_BY_SIDE)
	$(PYTEST) tests/integration -m "not chaos" --ignore=tests/integration/test_learning.py -n 2 --dist loadfile
	$(PYTEST) tests/integration/test_learning.py

test-unit: setup-dev ## tests with no cluster and no model; ARGS goes to pytest
	$(PYTEST) tests/unit $(SIDE_BY_SIDE) $(ARGS)

test-faults: setup-dev ## ten thousand seeded schedules, and kills at every named point; no cluster, no model
	$(PYTEST) tests/simulation tests/crash $(SIDE_BY_SIDE) $(ARGS)

test-integration: setup-dev ## tests on real Ray, vLLM and DeepSpeed; ARGS="-k resume" picks some
	$(PYTEST) tests/integration $(ARGS)

test-chaos: setup-dev ## whole runs that are disturbed from outside (minutes); not a part of `make test`
	$(PYTEST) tests/chaos tests/integration -m chaos

# Named in tests by `@pytest.mark.fault(..)`; a failing part does not keep the others' results from the page.
PARTS ?= tests/simulation tests/crash tests/unit tests/integration tests/chaos

fault-matrix: setup-dev ## run all tests of the fault matrix and write docs/reliability.md (an hour); PARTS="tests/crash" runs some
	@failed=0; \
	for part in $(PARTS); do $(PYTEST) $$part -m fault --fault-results docs/fault_matrix.json $(ARGS) || failed=1; done; \
	$(VENV)/python tools/fault_matrix.py || failed=1; \
	exit $$failed

chaos: setup ## train while parts of the run are killed, stopped and damaged, then audit it; ARGS="--seed 7 --minutes 30"
	$(VENV)/python -m bench.storm runs/storm-model
	$(VENV)/python -m sgpo_dist chaos --config examples/storm.yaml run_name=storm-$$(date +%Y%m%d-%H%M%S) --every 2 --patience 300 $(ARGS)

check: setup-dev ## ruff, mypy and the import rules, all of them even when one fails
	@failed=0; \
	$(VENV)/ruff check . || failed=1; \
	$(VENV)/mypy || failed=1; \
	$(VENV)/lint-imports || failed=1; \
	exit $$failed

bench: setup-dev ## our step, weight sync and loop against the usual ones, on this machine
	$(VENV)/python -m bench $(ARGS)

quality: setup-dev ## SGPO against its baselines on three tasks; arms that were run before are not run again (hours); ARGS goes to chat
	$(VENV)/python -m bench.quality language-noisy --split test --seeds 1,2,3
	$(VENV)/python -m bench.quality orders --split test --seeds 1,2,3
	$(VENV)/python -m bench.quality chat --split test --seeds 1 $(ARGS)

docs: setup-dev ## write the generated pages of docs/
	$(VENV)/python -m sgpo_dist config-reference --write docs/configuration.md

lock: setup ## compile requirements/*.txt from pyproject.toml
	$(VENV)/python tools/compile_requirements.py

clean: ## remove caches and build output; runs/ stays
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf .venv .venv.lock
