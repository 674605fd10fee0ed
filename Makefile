# Each target does its own set-up in .venv: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
# A pair that is known to work together; any torch>=2.11 does: `make demo TORCH="torch torchvision"`.
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := .venv/bin

.PHONY: demo test lint format clean

demo: .venv/installed
	$(BIN)/python -u train.py ckpt_path=last
	$(BIN)/python -u sample.py steps=4 output=outputs/demo/samples
	$(BIN)/python -u -m lcm.evaluate output=outputs/demo
	@model=$$(ls -td runs/lcd_mini/*/model | head -1); printf '%s\n' "" \
	  "model:   $$model   (a pipeline folder, diffusers opens it)" \
	  "picture: outputs/demo/grid.png   (teacher DDIM beside LCM, same prompts and seeds)" \
	  "table:   outputs/demo/table.md" \
	  "next:    $(BIN)/python sample.py prompts='person biking on a pink background' steps=2" \
	  "         $(BIN)/python train.py experiment=lcf_mini model.student=$$model   (another style, no teacher)"

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

clean:
	rm -rf .venv runs outputs data .mypy_cache .ruff_cache .pytest_cache
