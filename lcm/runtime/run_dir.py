"""The run folder: its name, its lock, config.yaml and run.json."""

import itertools
import json
import os
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from lcm.core.errors import UserError
from lcm.runtime.atomic_io import digest, locked, remove, whole_file
from lcm.runtime.launch import agree, child_environment, ended_runs, is_child, launcher, rendezvous_store, say
from lcm.runtime.redaction import redacted
from lcm.runtime.resume import FOLDER, checkpoints_in

LOCK = ".lock"
STARTED = {"run.json", "config.yaml", LOCK}  # all files of a run before its first step
locks: list[TextIO] = []  # the locks of the run that this process trains


def start_run(cfg: DictConfig) -> Path:
    """Make the run folder `<runs>/<name>/<id>`, the same for all ranks and restarts, and lock it.

    The id is paths.run_id, or the number of the SLURM job, or the next free number. `ckpt_path=last` chooses the newest run
    with a checkpoint.
    """
    if launcher().processes == 1 and not is_child():
        os.environ.pop("LOCAL_RANK", None)  # another program may have set it, and Lightning would wait for other ranks
    if is_child() and "LOCAL_RANK" not in os.environ:
        threading.Thread(target=end_with_sweep, daemon=True).start()
    run_dir = runs_folder(cfg) / run_name(cfg)
    with writable(cfg):
        wandb_id = lock_and_identify(run_dir)
    os.environ |= child_environment(run_dir)
    with open_dict(cfg):
        cfg.paths.run_dir, cfg.paths.wandb_id = str(run_dir), wandb_id
    return run_dir


def runs_folder(cfg: DictConfig) -> Path:
    """Return the folder of the runs with this name. Raises UserError for a name that is no folder in paths.runs."""
    if not cfg.name:
        raise UserError("name= is empty: give the run a name")
    if ".." in Path(cfg.name).parts or Path(cfg.name).is_absolute():
        raise UserError(f"name={cfg.name} is a path outside paths.runs: give a name, and the folder by paths.runs=<folder>")
    return Path(cfg.paths.runs) / str(cfg.name)


@contextmanager
def writable(cfg: DictConfig) -> Iterator[None]:
    """Turn an OSError into a UserError about the run folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run folder under {runs_folder(cfg)} ({error.strerror}): set paths.runs to a writable folder"
        ) from None


def run_name(cfg: DictConfig) -> str:
    """Make the run folder if needed, and return its name. Rank 0 chooses the name."""
    if is_child():
        return os.environ["LCM_RUN_ID"]

    def chosen() -> str:
        with writable(cfg):
            return choose_run(runs_folder(cfg), cfg.ckpt_path, cfg.paths.run_id)

    return agree("name", chosen)


def choose_run(parent: Path, ckpt_path: str | None, run_id: str | None = None) -> str:
    """Return the name of the run to resume, or make the folder of a new run and return its name.

    A run is resumed for `ckpt_path=last`, and after an earlier start of this SLURM job with the same command.
    """
    parent.mkdir(parents=True, exist_ok=True)
    if run_id is not None:
        return checked_run_id(parent, str(run_id), ckpt_path)
    job = os.environ.get("SLURM_JOB_ID")
    names = run_names(parent, job)
    abandoned = [name for name in names if is_of_earlier_start(parent / name)]
    for key, command_digest in command_digests().items():
        for name in abandoned:
            if read_run_json(parent / name).get(key, command_digest) == command_digest:
                return name
    for name in reversed(names) if ckpt_path == "last" else ():
        if checkpoints_in(parent / name / FOLDER):
            return name
    if abandoned:
        say(f"start:   a new run: {parent / abandoned[0]} is of another command, paths.run_id={abandoned[0]} resumes it")
    return new_run(parent, job)


def checked_run_id(parent: Path, name: str, ckpt_path: str | None) -> str:
    """Return the run's name for paths.run_id: in a sweep it gets the job's number. Make the folder.

    Raises UserError if the run exists and is not to be resumed.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        name = f"{name}-{HydraConfig.get().job.num}"
    run_dir = parent / name
    run_dir.mkdir(parents=True, exist_ok=True)
    resumed = ckpt_path == "last" or (ckpt_path and run_dir.resolve() in Path(ckpt_path).resolve().parents)
    if has_begun(run_dir) and not resumed and not is_of_earlier_start(run_dir):
        raise UserError(f"{run_dir} holds a run: resume it with ckpt_path=last, or choose another paths.run_id")
    return name


def run_names(parent: Path, job: str | None = None) -> list[str]:
    """Return the names of numbered runs, oldest first. job: only the runs of this SLURM job."""
    names = [path.name for path in parent.glob("[0-9]*") if re.fullmatch(rf"{job or '[0-9]+'}(-[0-9]+)?", path.name)]
    return sorted(names, key=lambda name: [int(number) for number in name.split("-")])


def new_run(parent: Path, job: str | None = None) -> str:
    """Make the first free folder and return its name. Programs that start at the same moment get different folders."""
    free: Iterator[str]
    if job is None:
        numbers = [int(name.partition("-")[0]) for name in run_names(parent)]
        free = map(str, itertools.count(numbers[-1] + 1 if numbers else 0))
    else:
        free = itertools.chain([job], (f"{job}-{number}" for number in itertools.count(1)))
    for name in free:
        try:
            (parent / name).mkdir(parents=True)  # a refused start may have removed the parent since
            return name
        except FileExistsError:
            continue
    raise AssertionError("itertools.count ends")


def read_run_json(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json, {} if it is missing."""
    file = run_dir / "run.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def is_of_earlier_start(run_dir: Path) -> bool:
    """Return whether an earlier start of this SLURM job, which has ended, trained in this folder."""
    start = read_run_json(run_dir).get("slurm", [run_dir.name.partition("-")[0], 0])  # None: without SLURM
    return start is not None and start[0] == os.environ.get("SLURM_JOB_ID") and start[1] < restarts()


def restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def command_digests() -> dict[str, str]:
    """Return two digests: of all overrides, and of the overrides of the training itself. Overrides may hold secrets."""
    all_overrides = sorted(override for override in overrides() if not override.startswith("paths.run_id="))
    settings = [override for override in all_overrides if re.match(r"[+~]*(name|seed|experiment|model|data)[./=@]", override)]
    return {"command": digest(all_overrides), "settings": digest(settings)}


def overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def has_begun(run_dir: Path) -> bool:
    """Return whether the run has made its first step."""
    return not {path.name for path in run_dir.iterdir()} <= STARTED


@contextmanager
def training(run_dir: Path) -> Iterator[None]:
    """Restore the environment and leave the process group afterwards. Remove the run folder if the start fails.

    Lightning's launcher leaves LOCAL_RANK, WORLD_SIZE and MASTER_PORT in the environment.
    """
    children_variables = child_environment(run_dir)
    before = {name: value for name, value in os.environ.items() if name not in children_variables}
    try:
        yield
        leave_group()
    except (UserError, MisconfigurationException):
        leave_group()
        remove_empty_run(run_dir)
        raise
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before
        ended_runs.append(run_dir)
        unlock_run()


def leave_group() -> None:
    rendezvous_store.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@rank_zero_only
def remove_empty_run(run_dir: Path) -> None:
    """Remove the folder of a run that has not begun, and the folder of its name if it holds no other run."""
    if not has_begun(run_dir):
        remove(run_dir)
        with suppress(OSError):  # the folder is not empty
            run_dir.parent.rmdir()


@rank_zero_only
def lock_and_identify(run_dir: Path) -> str:
    """Lock the run, and return the wandb id in its run.json; None on ranks above 0."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock_run(run_dir)
    for unfinished in list(run_dir.rglob("*.partial")):  # files of a killed start
        remove(unfinished)
    job = os.environ.get("SLURM_JOB_ID")
    update_run_json(run_dir, **command_digests(), slurm=None if job is None else [job, restarts()])
    say(f"run:     {run_dir}")
    return read_run_json(run_dir)["id"]


@rank_zero_only
def update_run_json(run_dir: Path, **values: Any) -> None:
    """Add values to run.json."""
    before = read_run_json(run_dir)
    after = {"id": uuid.uuid4().hex[:8], **before, **values}
    if after != before:
        with whole_file(run_dir / "run.json") as file:
            file.write(json.dumps(after).encode())


def lock_run(run_dir: Path) -> None:
    """Lock the run for the life of this process. Raises UserError if another process holds the lock.

    The lock of an earlier start of the same SLURM job is ignored: a file server may keep the lock of a lost node.
    """
    unlock_run()
    try:
        locks.append(locked(run_dir / LOCK))
    except BlockingIOError:
        if is_of_earlier_start(run_dir):
            return
        raise UserError(
            f"another process is training in {run_dir}: wait for its end or stop it, or start another run "
            f"(ckpt_path=null); if its machine is lost, remove {run_dir / LOCK}"
        ) from None


def unlock_run() -> None:
    while locks:
        locks.pop().close()


def save_metric(run_dir: Path, metric: Any) -> float | None:
    """Write the metric that a sweep minimises to run.json, for the sweep's process, and return it."""
    value = None if metric is None else float(metric)
    update_run_json(run_dir, optimized=value)
    return value


def end_with_sweep() -> None:
    """Stop this process by SIGTERM when the sweep's process ends, which closes this process's standard input."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


class ConfigFile(L.Callback):
    """Writes the configuration, without secrets, to config.yaml and the loggers.

    It is written at the first batch, so that a refused resume leaves the old config.yaml.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.written = cfg, False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.written or not trainer.is_global_zero:
            return
        self.written = True
        OmegaConf.save(redacted(OmegaConf.to_container(self.cfg)), Path(self.cfg.paths.run_dir, "config.yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams(redacted(OmegaConf.to_container(self.cfg, resolve=True)))
