# Each target does its own set-up in .venv: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
# A pair that is known to work together; any torch>=2.11 does: `make demo TORCH="torch torchvision"`.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: demo test lint format clean lock container

demo: .venv/installed
	$(BIN)/python -u train.py ckpt_path=last
	$(BIN)/python -u sample.py steps=4
	$(BIN)/python -u -m lcm.evaluate output=outputs/demo
	@model=$$(ls -td runs/lcd_mini/*/model | head -1); printf '%s\n' "" \
	  "model:   $$model   (a pipeline folder, diffusers opens it)" \
	  "picture: outputs/demo/grid.png   (teacher DDIM beside LCM, same prompts and seeds)" \
	  "table:   outputs/demo/table.md" \
	  "next:    $(BIN)/python sample.py prompts='person biking on a pink background' steps=2" \
	  "         $(BIN)/python train.py experiment=lcf_mini model.pipeline=$$model   (another style, no teacher)"

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist worksteal   # most tests, and the programs they start, keep to one thread

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

# The container's packages, with the hashes of their files for this machine's Python; VARIANT=cpu where pip knows an index of
# torch's CPU builds.
VARIANT ?= cuda
LOCKED = $(if $(filter cpu,$(VARIANT)),$(TORCH:%=%+cpu),$(TORCH))
lock:
	$(PYTHON) -m venv outputs/lock
	outputs/lock/bin/pip install --quiet --upgrade "pip>=25"
	outputs/lock/bin/pip install --quiet --dry-run --ignore-installed --report outputs/lock/report.json \
	  $(LOCKED) setuptools wheel ".[wandb,tensorboard,fid]"
	outputs/lock/bin/python docker/lock.py outputs/lock/report.json > docker/requirements.$(VARIANT).txt
	rm -rf outputs/lock

# Without a Docker engine; needs root, buildah and debootstrap. BUILD_OPTIONS are buildah's.
container:
	docker/build.sh

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
