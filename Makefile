# `make help` lists the targets. The two a newcomer needs, quickstart and test, set everything up themselves.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
TEXT := $(VENV)/.installed-text
DEV := $(VENV)/.installed-dev
# one process for each core, with one thread each; `make test WORKERS=1` runs them one after the other
WORKERS ?= logical
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(DEV) ## virtual environment with everything for development

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fewstep needs Python 3.11 or newer; try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CORE): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) torch
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e .
	@touch $@

$(TEXT): $(CORE)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[text]'
	@touch $@

$(DEV): $(CORE)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

quickstart: $(CORE) ## distil the bundled teacher on the CPU: 5 minutes, one HTML report
	HF_HUB_OFFLINE=1 $(BIN)/fewstep quickstart

text-quickstart: $(TEXT) ## distil the bundled text-to-image teacher on the CPU: 5 minutes of training, one HTML report
	HF_HUB_OFFLINE=1 $(BIN)/fewstep text-quickstart

test: $(DEV) ## the tests that CI runs, on every core: 8 to 12 minutes on two
	$(PYTEST)

test-long: $(DEV) ## every test: the full matrices, 1,000 damaged files a format, every key of every config, 100 kills and 105 small disks, too
	FUZZ_FILES=1000 $(PYTEST) -m 'long or not long'

test-distributed: $(DEV) ## many processes on this machine: equality with one in every family, memory mode and split; 20 kills; bad input
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed -m 'long or not long'

test-fast: $(DEV) ## the tests that need seconds, in under 90 of them
	$(PYTEST) -m 'not slow and not long'

test-diffusers: $(DEV) ## the tests that touch diffusers, under each of its versions since 0.35; ends with a table
	VENV=$(VENV) .ci/diffusers_matrix $(VERSIONS)

test-clients: $(DEV) ## other programs run what we export: stable-diffusion.cpp, ComfyUI where COMFYUI_DIR names a checkout, diffusers; 15 minutes, 12 GB
	test -x .clients/bin/python || $(PYTHON) -m venv .clients
	.clients/bin/python -m pip install -q $(PIP_ARGS) cyllama==0.2.18 numpy
	CLIENTS_PYTHON=$(CURDIR)/.clients/bin/python HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long -s -rs tests/clients
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/export/test_single_file.py tests/export/test_text_pipeline.py tests/export/test_lora.py

format: $(DEV) ## format the code
	$(BIN)/ruff format src tests examples benchmarks
	$(BIN)/ruff check --fix src tests examples benchmarks

lint: $(DEV) ## check format and lint
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks

types: $(DEV) ## type-check all of src
	$(BIN)/mypy

bench: $(CORE) ## speed of a DMD2 step against the plain reading of the method, as ratios
	$(BIN)/python benchmarks/step_speed.py

docs: $(DEV) ## rewrite the generated parts of docs/ (settings tables)
	$(BIN)/python docs/generate.py

assets: $(CORE) ## remake the bundled teacher, features and pictures from data/fashion-mnist (about an hour on 2 cores)
	$(BIN)/fewstep pretrain recipes/fashion_mnist_teacher.toml
	$(BIN)/python examples/bundle_fashion_mnist.py data/fashion-mnist runs/fashion-mnist-teacher

emoji-assets: $(TEXT) ## remake the bundled text-to-image teachers, features and prompts from data/emoji (an hour of training on 2 cores, then 50 minutes for features and figures)
	for stage in vae sd sdxl; do $(BIN)/python examples/train_emoji_teacher.py data/emoji runs/emoji --stage $$stage || exit 1; done
	$(BIN)/python examples/bundle_emoji.py data/emoji runs/emoji

.PHONY: help setup quickstart text-quickstart test test-long test-distributed test-fast test-diffusers test-clients format lint types bench docs assets emoji-assets
