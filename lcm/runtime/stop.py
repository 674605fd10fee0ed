"""Save and stop a run between two batches, on Ctrl-C and at SLURM's preemption or time limit."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage as LoopStage
from lightning.pytorch.plugins.environments import LightningEnvironment

from lcm.core.numbers import Count
from lcm.runtime import signals

log = logging.getLogger(__name__)
SIGNALS = (signals.SIGINT, signals.SIGUSR1, signals.SIGTERM)


class StopOnSignal(Checkpoint):
    """Saves a checkpoint to `path` and exits on a signal. The last step of a training is saved, too.

    The exit code is 130 for SIGINT (Ctrl-C), 143 for SIGTERM, and 138 for SIGUSR1, which requeues the SLURM job. A second
    Ctrl-C ends the process at once. A signal to any rank counts for all ranks. The ranks compare their signals on the CPU at
    every `every_n_steps`-th optimizer step and validation batch.

    The class is a `Checkpoint`, so that Lightning runs it after all other callbacks.
    """

    def __init__(self, path: str, *, every_n_steps: Count) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.group: Any = None
        self.last = 0
        self.before: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        signals.listen(*SIGNALS)
        # Lightning's signal handlers run collectives, in which ranks can hang. Its loop broadcasts SIGTERM in every batch,
        # which waits for the device.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.last = trainer.global_step
        validate_again(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.last and self.due(trainer.global_step):  # not while gradients accumulate
            self.stop_if_asked(trainer)
        self.last = trainer.global_step
        if trainer.global_step == trainer.max_steps or trainer.should_stop:  # trainer.max_time sets should_stop
            self.save_the_end(trainer)

    def save_the_end(self, trainer: L.Trainer) -> None:
        """Save the last step, unless a ModelCheckpoint has just written it: more steps or an export may follow."""
        periodic = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        saved = [callback.filename for callback in periodic if callback._last_global_step_saved == trainer.global_step]
        if Path(self.path).stem not in saved:
            trainer.save_checkpoint(self.path)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and self.due(batch_idx) and not trainer.fit_loop._should_accumulate():
            self.stop_if_asked(trainer)

    def due(self, count: int) -> bool:
        """Return whether the ranks compare their signals at this step or validation batch."""
        return self.group is None or count % self.every_n_steps == 0

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        signum = torch.tensor(signals.recorded_signal())
        if self.group is not None:
            dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.group)
        if not signum:
            return
        received = signal.Signals(int(signum))
        trainer.save_checkpoint(self.path)
        trainer.strategy.checkpoint_io.teardown()  # wait for an asynchronous write
        if trainer.training:
            trainer._logger_connector.update_train_step_metrics()  # Lightning logs a step after this hook
        for logger in trainer.loggers if received is signal.SIGUSR1 else ():
            logger.finalize("requeued")  # before SLURM ends wandb's process
        if trainer.is_global_zero:
            requeued = received is signal.SIGUSR1 and requeue()
            advice = f"run the same command with {resume_override()}ckpt_path=last to resume"
            outcome = "the job is requeued" if requeued else advice
            print(f"{received.name}: stopped at step {trainer.global_step}: {outcome}", file=sys.stderr, flush=True)
        if self.group is not None:
            dist.barrier(group=self.group)  # srun ends the other ranks when one ends first
        raise SystemExit(0 if started_by_lightning(trainer) else 128 + received)


def started_by_lightning(trainer: L.Trainer) -> bool:
    """Return whether Lightning's launcher started this process.

    The launcher kills the main process when the exit code of a child is not 0.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0


def validate_again(trainer: L.Trainer) -> None:
    """Repeat a validation that was due at the checkpoint's step and had not ended. Called before the first step.

    Lightning would skip this validation.
    """
    loop = trainer.fit_loop.epoch_loop
    train, validation = loop.batch_progress, loop.val_loop.batch_progress
    every = trainer.val_check_batch if any(trainer.num_val_batches) else None
    due = loop.restarting and every is not None and train.total.ready % every == 0
    if due and any(progress.current.completed < progress.current.ready for progress in (train, validation)):
        if train.current.completed < train.current.ready:
            train.increment_completed()
        validation.reset()
        loop._restart_stage = LoopStage.RESTARTED_ON_LAST  # the batch is done
        loop.val_loop._restart_stage = ValidationStage.RESTARTED_MID_EVALUATION  # the validation is not


def requeue() -> bool:
    """Ask SLURM to run this job again. Return whether the job is requeued.

    A container has no `scontrol`. docker/train.sbatch then requeues the job outside of the container.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return job is not None
    with signals.held_back():  # the requeue sends SIGTERM to scontrol, too
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if result.returncode:
        log.error("job %s cannot be requeued: %s", job, result.stderr.strip())
    return result.returncode == 0


def resume_override() -> str:
    """Return the override by which another SLURM job resumes this run, whose name is this job's number."""
    return f"paths.run_id={os.environ['LCM_RUN_ID']} " if {"SLURM_JOB_ID", "LCM_RUN_ID"} <= set(os.environ) else ""
