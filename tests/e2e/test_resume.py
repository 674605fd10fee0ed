"""A run that is stopped and resumed with ckpt_path=last equals the uninterrupted run."""

import csv
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.e2e import warm
from tests.e2e.conftest import command, environment

pytestmark = pytest.mark.slow
STEPS = [
    "trainer.max_steps=30",
    "callbacks.checkpoint.every_n_train_steps=3",
    "callbacks.samples.steps=[1]",
    "data.num_workers=1",
    "callbacks/keep=every",
    "callbacks.keep.every_n_train_steps=10",
]


def losses(run_dir: Path) -> dict[int, str]:
    """Return train/loss by step. A repeated step has two rows, and the last row counts."""
    rows = csv.DictReader((run_dir / "metrics.csv").open())
    return {int(row["step"]): row["train/loss"] for row in rows if row["train/loss"]}


def interrupt(args: list[str], cwd: Path, when: Path) -> int:
    """Start training, press Ctrl-C shortly after the first checkpoint (`when`), and return the exit code."""
    process = warm.start(args, cwd, environment(), cwd / "log")
    deadline = time.monotonic() + 240
    while not when.is_file():
        assert process.poll() is None, (cwd / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, which also signals the workers
    return process.wait(timeout=120)


def test_interrupted_run_equals_uninterrupted(run, tiny, tmp_path):
    """Ctrl-C interrupts the run. tests/e2e/test_faults.py kills a run instead."""
    straight = run("train.py", *tiny, *STEPS, "name=straight")
    assert straight.returncode == 0, straight.stderr
    run_dir = tmp_path / "runs/cut/0"
    last = run_dir / "checkpoints/last.ckpt"
    assert interrupt(command("train.py", *tiny, *STEPS, "name=cut"), tmp_path, last) == 130
    assert not (run_dir / "model").exists(), "it finished before the signal: raise max_steps"
    step, log = torch.load(last, weights_only=True)["global_step"], (tmp_path / "log").read_text()
    assert f"stopped at step {step}: run the same command with ckpt_path=last to resume" in log
    assert "Traceback" not in log

    resumed = run("train.py", *tiny, *STEPS, "name=cut", "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run_dir) == losses(tmp_path / "runs/straight/0")
    one, other = (
        torch.load(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("cut", "straight")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((tmp_path / "runs").rglob("*.partial"))
    names = {path.stem for path in last.parent.iterdir()}
    assert names == {"last", "previous", "step_10", "step_20", "step_30"}


def test_resume_follows_the_command_line(run, tiny, tmp_path):
    options = [*tiny, "callbacks.samples.steps=[1]", "model/lr_schedule=constant", "model.lr_schedule.warmup=0", "name=lr"]
    assert run("train.py", *options, "trainer.max_steps=3").returncode == 0
    run_dir = tmp_path / "runs/lr/0"
    config = (run_dir / "config.yaml").read_text()
    refused = run("train.py", *options, "ckpt_path=last", "model.zero_init=false")
    assert refused.returncode == 1
    assert "error: model.zero_init was True when this training began and cannot change to False" in refused.stderr
    assert (run_dir / "config.yaml").read_text() == config

    resumed = run("train.py", *options, "ckpt_path=last", "model.optimizer.lr=1e-6", "model.guidance_lr_multiplier=3")
    assert resumed.returncode == 0, resumed.stderr
    rows = [row for row in csv.DictReader((run_dir / "metrics.csv").open()) if row["lr-AdamW/pg1"]]
    rates = [(float(row["lr-AdamW/pg1"]), float(row["lr-AdamW/pg2"])) for row in rows]
    assert rates == [pytest.approx((1e-4, 1e-3))] * 3 + [pytest.approx((1e-6, 3e-6))] * 3
    assert "lr: 1.0e-06" in (run_dir / "config.yaml").read_text()
