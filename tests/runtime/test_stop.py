"""A signal stops a run, and a requeued job resumes it. tests/slurm tests the same on a cluster."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf

from lcm.runtime import signals
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.resume import resume_path
from lcm.runtime.stop import StopOnSignal, requeue, started_by_lightning
from tests.e2e import warm
from tests.runtime.test_checkpoint_io import content


def rank(number: int, folder: Path, signum: int) -> None:
    """Run one of two ranks until the signal stops it. Write the step of its checkpoint to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    stop = StopOnSignal("unused", every_n_steps=2)
    stop.group = dist.new_group(backend="gloo")
    saved = folder / f"saved-{number}"
    trainer = SimpleNamespace(
        global_step=0,
        max_steps=100,
        should_stop=False,
        training=False,
        loggers=[],
        is_global_zero=number == 0,
        save_checkpoint=lambda path: saved.write_text(str(trainer.global_step)),
        strategy=SimpleNamespace(checkpoint_io=SimpleNamespace(teardown=lambda: None)),
    )
    for step in range(1, 9):
        trainer.global_step = step
        if step == 3 and number == 1:
            signals._recorded = signum
        stop.on_train_batch_end(trainer, None, None, None, step - 1)


def test_signal_to_one_rank_stops_all(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    ranks = [warm.context.Process(target=rank, args=(number, tmp_path, signals.SIGTERM)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [143, 143]
    assert [(tmp_path / f"saved-{number}").read_text() for number in range(2)] == ["4", "4"]


def test_job_is_requeued_by_number(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue()
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    scontrol.write_text("#!/bin/sh\nkill -TERM $$\n")  # a requeue sends SIGTERM to scontrol, too
    assert requeue()
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert not requeue()
    monkeypatch.setenv("PATH", "/nowhere")  # in a container, the batch script requeues the job
    assert requeue()


@pytest.mark.parametrize(
    ("environment", "local", "expected"),
    [(LightningEnvironment, 0, False), (LightningEnvironment, 1, True), (TorchElasticEnvironment, 1, False), (None, 0, False)],
)
def test_lightning_children_exit_with_0(environment, local, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    strategy = SimpleNamespace(cluster_environment=environment()) if environment else SimpleNamespace()
    assert started_by_lightning(SimpleNamespace(strategy=strategy)) is expected


def test_requeued_job_resumes_its_checkpoint(tmp_path, monkeypatch):
    cfg = OmegaConf.create({"ckpt_path": None, "paths": {"run_dir": str(tmp_path)}})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resume_path(cfg.copy()) is None
    (tmp_path / "checkpoints").mkdir()
    AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "checkpoints/last.ckpt")
    assert resume_path(cfg.copy()) == f"{tmp_path}/checkpoints/last.ckpt"
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert resume_path(cfg.copy()) is None
