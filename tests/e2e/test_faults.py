"""Faults of a training: kills at random moments, a full disk, a stuck worker, no wandb."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from lcm.runtime.resume import newest_undamaged
from tests.e2e import warm
from tests.e2e.conftest import command, environment
from tests.e2e.test_errors import complaint
from tests.e2e.test_resume import losses

pytestmark = pytest.mark.slow
ROUNDS = int(os.environ.get("LCM_ROUNDS", "2"))
SAVE = "callbacks.checkpoint.every_n_train_steps={}".format


@pytest.fixture
def start(tmp_path):
    """Start train.py in a new session, with its output in tmp_path/log. The fixture kills it at the test's end.

    cold: start a new interpreter, so that the test covers the interpreter's exit.
    """
    started = []

    def start(*args: str, cold: bool = False) -> subprocess.Popen | warm.Started:
        default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job inherits an ignored SIGINT
        elsewhere = environment(TMPDIR="/dev/shm")  # another filesystem: a move from there copies the file
        if not cold:
            started.append(warm.start(command("train.py", *args), tmp_path, elsewhere, tmp_path / "log"))
            return started[-1]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                command("train.py", *args),
                cwd=tmp_path,
                env=elsewhere,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=default,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def wait(tmp_path):
    """Wait until a condition holds. Fail if the process ends first."""

    def wait(process: subprocess.Popen | warm.Started, condition: Callable[[], object], pause: float = 0.01) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(pause)

    return wait


def finished(process: subprocess.Popen, log: Path) -> subprocess.CompletedProcess:
    code = process.wait(timeout=120)
    return subprocess.CompletedProcess(process.args, code, "", log.read_text())


def loaded(path):
    return torch.load(path, weights_only=True)


def test_killed_run_equals_uninterrupted(run, tiny, start, wait, tmp_path):
    """Kills come after a new checkpoint, in a write, and sometimes at start-up. LCM_ROUNDS=50 gives the published figure."""
    steps = ["trainer.max_steps=" + str(20 + 8 * ROUNDS), SAVE(1), "callbacks.samples.steps=[1]", "data.num_workers=1"]
    straight = run("train.py", *tiny, *steps, "name=straight")
    assert straight.returncode == 0, straight.stderr
    run_dir = tmp_path / "runs/cut/0"
    folder, reached, inside = run_dir / "checkpoints", 0, 0
    last, partial_file = folder / "last.ckpt", folder / "last.partial"

    def inode() -> int | None:
        with suppress(FileNotFoundError):  # a save may just have renamed it to previous.ckpt
            return last.stat().st_ino

    def completed() -> int:
        for path in (last, folder / "previous.ckpt"):
            with suppress(FileNotFoundError):
                return loaded(path)["global_step"]
        return reached

    for n in range(ROUNDS):
        before = inode()
        asynchronous = f"async_checkpoints={'true' if n // 2 % 2 else 'false'}"
        process = start(*tiny, *steps, "name=cut", "ckpt_path=last", asynchronous)
        if n % 10 == 9:
            wait(process, lambda: "run:" in (tmp_path / "log").read_text())
        else:
            wait(process, lambda before=before: inode() not in (None, before))
        before_kill = completed()
        if n % 2:
            wait(process, partial_file.exists, pause=0)
        else:
            time.sleep(random.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=120)
        inside += partial_file.exists()
        reached = loaded(newest_undamaged(folder))["global_step"]
        assert reached >= before_kill
    print(f"{ROUNDS} kills up to step {reached}, {inside} of them inside a write")
    assert not (run_dir / "model").exists(), "it finished before the last kill: raise max_steps"

    resumed = run("train.py", *tiny, *steps, "name=cut", "ckpt_path=last", "async_checkpoints=true")
    assert resumed.returncode == 0, resumed.stderr
    resumed_losses, expected = losses(run_dir), losses(tmp_path / "runs/straight/0")
    assert resumed_losses.items() <= expected.items()
    assert len(resumed_losses) >= len(expected) - ROUNDS  # a step's row is written after its checkpoint
    one, other = (loaded(tmp_path / f"runs/{name}/0/checkpoints/last.ckpt")["state_dict"] for name in ("cut", "straight"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((tmp_path / "runs").rglob("*.partial"))


@pytest.fixture
def small_disk(tmp_path):
    """Yield a folder on a disk with room for two of the tiny checkpoints, but not for a third."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small filesystem needs root and CAP_SYS_ADMIN: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_leaves_the_checkpoint(run, tiny, small_disk):
    message = complaint(run("train.py", *tiny, "trainer.max_steps=30", SAVE(1), f"paths.runs={small_disk}"))
    folder = small_disk / "lcd_mini/0/checkpoints"
    assert f"{folder}/last.ckpt cannot be written whole (No space left on device): make room" in message
    assert loaded(newest_undamaged(folder))["global_step"] >= 1
    assert not list(small_disk.rglob("*.partial"))


def test_stuck_worker_ends_the_training(start, wait, tiny, tmp_path):
    """The interpreter's exit does not wait for the worker either. tests/data/test_datamodule.py kills a worker."""
    options = ["trainer.max_steps=100000", "trainer.val_check_interval=100000"]
    process = start(*tiny, *options, SAVE(1), "data.num_workers=1", "+data.timeout=10", cold=True)
    wait(process, (tmp_path / "runs/lcd_mini/0/checkpoints/previous.ckpt").exists)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert children
    for child in children:
        os.kill(child, signal.SIGSTOP)
    message = complaint(finished(process, tmp_path / "log"))
    assert "no data came for 10 seconds" in message
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_training_continues_without_wandb(run, tiny, tmp_path):
    options = ["logger=[csv,tensorboard,wandb]", "logger.wandb.settings.init_timeout=3", "trainer.max_steps=3"]
    nobody = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
    done = run("train.py", *tiny, *options, **nobody)
    assert done.returncode == 0, done.stderr
    assert "warning: wandb does not answer, so it logs to disk: send the run later with `wandb sync " in done.stderr
    [folder] = (tmp_path / "runs/lcd_mini/0/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert (tmp_path / "runs/lcd_mini/0/model").is_dir()
