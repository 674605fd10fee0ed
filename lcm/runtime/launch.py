"""Processes started by torchrun, srun or mpirun, and their agreement on a run and a checkpoint."""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.distributed import Store, rendezvous

from lcm.core.errors import UserError
from lcm.runtime.slurm import set_step_rendezvous

ended_runs: list[Path] = []  # run directories of the trainings that have ended in this process


class Launcher(NamedTuple):
    """The program that started this process as one of several."""

    name: str
    rank: int
    processes: int


def launcher() -> Launcher:
    """Return the launcher and this process's rank. A process that was started alone is rank 0 of 1."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # Lightning's own launcher does not set RANK
        return Launcher("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]))
    if "OMPI_COMM_WORLD_SIZE" in env:
        return Launcher("mpirun", int(env.get("OMPI_COMM_WORLD_RANK", 0)), int(env["OMPI_COMM_WORLD_SIZE"]))
    rank = int(env.get("SLURM_PROCID", 0))
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS") if rank else None)  # a batch script has no step
    if tasks is not None:
        return Launcher("srun", rank, int(tasks))
    return Launcher("mpirun", int(env.get("PMI_RANK", 0)), int(env.get("PMI_SIZE", 1)))


def check_processes(trainer: DictConfig) -> None:
    """Raise UserError if the number of started processes differs from the trainer's."""
    name, _, processes = launcher()
    devices, nodes = device_count(trainer), trainer.num_nodes
    wanted = f"trainer.devices={trainer.devices} and trainer.num_nodes={nodes} make {devices * nodes}"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning then ignores srun
    if processes == 1:
        tasks = os.environ.get("SLURM_NTASKS")
        if tasks is not None and devices * nodes > 1 and not interactive:
            raise UserError(
                f"SLURM has {tasks} task(s) and srun started 1 process, but {wanted}: start them with "
                f"`srun --nodes={nodes} --ntasks-per-node={devices}` and trainer=slurm"
            )
        if nodes > 1:
            raise UserError(
                f"trainer.num_nodes={nodes} needs a launcher on every node: start the program with torchrun or srun"
            )
    elif name == "mpirun":
        raise UserError(
            f"mpirun started {processes} processes, which do not join in one training: start them with torchrun or srun"
        )
    elif devices * nodes != processes:
        local = os.environ.get("LOCAL_WORLD_SIZE", "") if name == "torchrun" else os.environ.get("SLURM_NTASKS_PER_NODE", "")
        machines = processes // int(local) if local.isdigit() else 1
        joined = "trainer=slurm" if name == "srun" and local else f"trainer=ddp trainer.devices={processes // machines}"
        joined += f" trainer.num_nodes={machines}" if machines > 1 and name == "torchrun" else ""
        joined = joined if name == "torchrun" or local else f"srun --ntasks-per-node={processes} and trainer=slurm"
        raise UserError(f"{name} started {processes} processes, but {wanted}: use {joined}, or start one process")
    elif name == "srun" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"srun --ntasks={processes} does not say how many run on each node: use --ntasks-per-node and trainer=slurm"
        )
    elif name == "srun" and interactive and "slurm_environment" not in str(trainer.get("plugins")):
        raise UserError(
            f"srun started {processes} processes in an interactive job, which only trainer=slurm joins: use trainer=slurm"
        )


def device_count(trainer: DictConfig) -> int:
    """Return the number of processes on each node."""
    devices = trainer.devices
    if OmegaConf.is_list(devices) or "," in str(devices):
        return len([device for device in str(devices).strip("[]").split(",") if device.strip()])
    if str(devices) not in ("auto", "-1"):
        if not str(devices).isdecimal() or int(devices) < 1:
            raise UserError(f"trainer.devices={devices}: expected auto, a number from 1, or a list of devices")
        return int(devices)
    return 1 if trainer.accelerator == "cpu" else max(torch.cuda.device_count(), 1)


def child_environment(run_dir: Path) -> dict[str, str]:
    """Return the environment variables by which child processes join this process's run."""
    return {"LCM_RUN_ID": run_dir.name, "LCM_RUN_PROCESS": str(os.getpid())}


def is_child() -> bool:
    """Return whether the parent process, a training or a sweep, has chosen the run."""
    return os.environ.get("LCM_RUN_PROCESS") == str(os.getppid())


def agree(subject: str, choose: Callable[[], str]) -> str:
    """Return `choose()` of rank 0. Other ranks of torchrun or srun read it from the rendezvous store.

    A UserError of rank 0 is raised on every rank. torchrun keeps its store over restarts.
    """
    if launcher().processes == 1:
        return choose()
    store, rank = rendezvous_store()
    key = f"{subject} of run {len(ended_runs)}, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        try:
            store.set(key, f"choice {choose()}")
        except UserError as error:
            store.set(key, f"error {error}")
    outcome, _, text = store.get(key).decode().partition(" ")
    if launcher().name == "srun":  # rank 0 serves the store until all have read
        store.set(f"{key}, rank {rank}", "")
        store.wait([f"{key}, rank {other}" for other in range(launcher().processes)])
    if outcome == "error":
        raise UserError(text)
    return text


@cache
def rendezvous_store() -> tuple[Store, int]:
    """Return the rendezvous store and this process's rank. The cache keeps the store open, because rank 0 may serve it."""
    name, rank, processes = launcher()
    if name == "srun":
        set_step_rendezvous()
    store, rank, _ = next(rendezvous(f"env://?rank={rank}&world_size={processes}"))
    return store, rank


@rank_zero_only
def say(line: str) -> None:
    """Print a line on rank 0."""
    print(line, flush=True)


@rank_zero_only
def warn(line: str) -> None:
    """Print a line to stderr on rank 0."""
    print(line, file=sys.stderr, flush=True)
