# `make demo` and `make test` set up .venv first, so they work on a fresh machine.
PYTHON ?= python3
# Tested versions. Any torch>=2.11 works: `make demo TORCH="torch torchvision"`.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: demo test lint format docs clean lock

demo: .venv/installed
	$(BIN)/python -u train.py ckpt_path=last
	$(BIN)/python -u sample.py steps=4
	$(BIN)/python -u -m lcm.evaluate entries=undistilled suite=mixed output=outputs/demo
	@model=$$(ls -td runs/lcd_mini/*/model | head -1); printf '%s\n' "" \
	  "model:   $$model   (a pipeline folder, diffusers opens it)" \
	  "picture: outputs/demo/grid.png   (teacher beside LCM: exact and vague prompts, the same seeds)" \
	  "table:   outputs/demo/table.md" \
	  "next:    $(BIN)/python sample.py prompts='person biking on a pink background' steps=2" \
	  "         $(BIN)/python train.py experiment=lcf_mini model.pipeline=$$model   (another style, no teacher)"

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist worksteal   # most tests and the programs that they start use one thread

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .ci/mkdocs.yml
	@echo "site:    outputs/site/index.html"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# Pin the container's packages to versions and hashes, for this machine's Python. VARIANT=cpu needs a pip index with torch's CPU
# builds.
VARIANT ?= cuda
LOCKED = $(if $(filter cpu,$(VARIANT)),$(TORCH:%=%+cpu),$(TORCH))
lock:
	$(PYTHON) -m venv outputs/lock
	outputs/lock/bin/pip install --quiet --upgrade "pip>=25"
	outputs/lock/bin/pip install --quiet --dry-run --ignore-installed --report outputs/lock/report.json \
	  $(LOCKED) setuptools wheel ".[tensorboard,fid]"
	outputs/lock/bin/python docker/lock.py outputs/lock/report.json > docker/requirements.$(VARIANT).txt
	rm -rf outputs/lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
