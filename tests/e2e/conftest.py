"""Fixtures that run the real programs as a user does, on the tiny pipeline and a few shards."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import warm

ROOT = Path(__file__).parents[2]
Result = subprocess.CompletedProcess


def command(program: str, *args: str) -> list[str]:
    head = ["-m", program] if program.startswith("lcm.") else [str(ROOT / program)]
    return [sys.executable, *head, *args]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **more}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    """Run a program in an empty working directory. Return the finished process with its text output."""
    return lambda program, *args, **env: warm.run(command(program, *args), tmp_path, environment(**env), timeout=900)


@pytest.fixture
def run_cold(tmp_path: Path) -> Callable[..., Result]:
    """Run a program like `run`, but in a new interpreter, which imports the libraries itself."""
    return lambda program, *args, **env: subprocess.run(
        command(program, *args), cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="session")
def tiny(tiny_pipeline: Path, shards: Path) -> list[str]:
    """Return overrides that shrink the default experiment to seconds."""
    return [
        f"model.pipeline={tiny_pipeline}",
        *tiny_data(shards),
        "trainer.max_steps=6",
        "callbacks.checkpoint.every_n_train_steps=2",
        "callbacks.samples.steps=[1,2]",
    ]


def tiny_data(shards: Path) -> list[str]:
    return [
        f"data.shards={shards}/train-*.tar",
        f"data.val_shards={shards}/val-*.tar",
        "data.build=null",
        "data.resolution=32",
        "data.batch_size=4",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=3",
    ]
