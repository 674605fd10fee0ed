"""The run folder: its name, lock, configuration and notes."""

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
from lcm.runtime.launch import agreed, is_child, launcher, meeting_place, say, told_to_children, trained
from lcm.runtime.redaction import redacted
from lcm.runtime.resume import FOLDER, saved

LOCK = ".lock"
STARTED = {"run.json", "config.yaml", LOCK}  # all files of a run before its first step
locks: list[TextIO] = []  # of the run that this process trains


def start_run(cfg: DictConfig) -> Path:
    """Make the run folder `<runs>/<name>/<id>`, the same for all ranks and restarts, and lock it.

    The id is paths.run_id, or the SLURM job's, or the next free number. `ckpt_path=last` resumes in the newest run that has a
    checkpoint.
    """
    if launcher().processes == 1 and not is_child():
        os.environ.pop("LOCAL_RANK", None)  # left by another program, it would make Lightning wait for other ranks
    if is_child() and "LOCAL_RANK" not in os.environ:
        threading.Thread(target=end_with_sweep, daemon=True).start()
    run_dir = runs_folder(cfg) / run_name(cfg)
    with writable(cfg):
        wandb_id = identify(run_dir)
    os.environ |= told_to_children(run_dir)
    with open_dict(cfg):
        cfg.paths.run_dir, cfg.paths.wandb_id = str(run_dir), wandb_id
    return run_dir


def runs_folder(cfg: DictConfig) -> Path:
    if not cfg.name:
        raise UserError("name= is empty: give the run a name")
    if ".." in Path(cfg.name).parts or Path(cfg.name).is_absolute():
        raise UserError(f"name={cfg.name} is a path outside paths.runs: give a name, and the folder by paths.runs=<folder>")
    return Path(cfg.paths.runs) / str(cfg.name)


@contextmanager
def writable(cfg: DictConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run folder under {runs_folder(cfg)} ({error.strerror}): set paths.runs to a writable folder"
        ) from None


def run_name(cfg: DictConfig) -> str:
    """Return the name of the run folder, which then exists. Rank 0 chooses it."""
    if is_child():
        return os.environ["LCM_RUN_ID"]

    def chosen() -> str:
        with writable(cfg):
            return choose(runs_folder(cfg), cfg.ckpt_path, cfg.paths.run_id)

    return agreed("name", chosen)


def choose(parent: Path, ckpt_path: str | None, run_id: str | None = None) -> str:
    """Return the name of a new run, whose folder is made, or of the run to resume.

    A run is resumed for `ckpt_path=last`, and after an earlier start of this SLURM job with the same command.
    """
    parent.mkdir(parents=True, exist_ok=True)
    if run_id is not None:
        return given(parent, str(run_id), ckpt_path)
    job = os.environ.get("SLURM_JOB_ID")
    names = run_names(parent, job)
    abandoned = [name for name in names if left_by_earlier_start(parent / name)]
    for digest_of, mine in command().items():
        for name in abandoned:
            if remembered(parent / name).get(digest_of, mine) == mine:
                return name
    for name in reversed(names) if ckpt_path == "last" else ():
        if saved(parent / name / FOLDER):
            return name
    if abandoned:
        say(f"start:   a new run: {parent / abandoned[0]} is of another command, paths.run_id={abandoned[0]} resumes it")
    return new_run(parent, job)


def given(parent: Path, name: str, ckpt_path: str | None) -> str:
    """Return paths.run_id as the run's name, with the job's number in a sweep. Raises UserError if that run exists."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        name = f"{name}-{HydraConfig.get().job.num}"
    run_dir = parent / name
    run_dir.mkdir(parents=True, exist_ok=True)
    resumed = ckpt_path == "last" or (ckpt_path and run_dir.resolve() in Path(ckpt_path).resolve().parents)
    if begun(run_dir) and not resumed and not left_by_earlier_start(run_dir):
        raise UserError(f"{run_dir} holds a run: resume it with ckpt_path=last, or choose another paths.run_id")
    return name


def run_names(parent: Path, job: str | None = None) -> list[str]:
    """Return the names of numbered runs, or of the runs of a SLURM job, oldest first."""
    names = [path.name for path in parent.glob("[0-9]*") if re.fullmatch(rf"{job or '[0-9]+'}(-[0-9]+)?", path.name)]
    return sorted(names, key=lambda name: [int(number) for number in name.split("-")])


def new_run(parent: Path, job: str | None = None) -> str:
    """Make the first free folder and return its name. Programs that start at the same moment get different ones."""
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


def remembered(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json."""
    file = run_dir / "run.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def left_by_earlier_start(run_dir: Path) -> bool:
    """Whether an earlier start of this SLURM job, which has ended, trained here."""
    start = remembered(run_dir).get("slurm", [run_dir.name.partition("-")[0], 0])  # None: without SLURM
    return start is not None and start[0] == os.environ.get("SLURM_JOB_ID") and start[1] < restarts()


def restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def command() -> dict[str, str]:
    """Return two digests: of all overrides, and of the training's. Overrides may hold secrets."""
    whole = sorted(override for override in overrides() if not override.startswith("paths.run_id="))
    settings = [override for override in whole if re.match(r"[+~]*(name|seed|experiment|model|data)[./=@]", override)]
    return {"command": digest(whole), "settings": digest(settings)}


def overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def begun(run_dir: Path) -> bool:
    return not {path.name for path in run_dir.iterdir()} <= STARTED


@contextmanager
def training(run_dir: Path) -> Iterator[None]:
    """Restore the environment and the process group afterwards; remove the run folder if start-up fails.

    Lightning's launcher leaves LOCAL_RANK, WORLD_SIZE and MASTER_PORT in the environment.
    """
    told = told_to_children(run_dir)
    before = {name: value for name, value in os.environ.items() if name not in told}
    try:
        yield
        leave_group()
    except (UserError, MisconfigurationException):
        leave_group()
        remove_unbegun(run_dir)
        raise
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before
        trained.append(run_dir)
        release()


def leave_group() -> None:
    meeting_place.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@rank_zero_only
def remove_unbegun(run_dir: Path) -> None:
    """Remove the folder of a run without its first step, and the folder of its name if no other run is there."""
    if not begun(run_dir):
        remove(run_dir)
        with suppress(OSError):  # it is not empty
            run_dir.parent.rmdir()


@rank_zero_only
def identify(run_dir: Path) -> str:
    """Lock the run and return its wandb id, which run.json keeps; None on other ranks."""
    run_dir.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    for unfinished in list(run_dir.rglob("*.partial")):  # of a killed start
        remove(unfinished)
    job = os.environ.get("SLURM_JOB_ID")
    note(run_dir, **command(), slurm=None if job is None else [job, restarts()])
    say(f"run:     {run_dir}")
    return remembered(run_dir)["id"]


@rank_zero_only
def note(run_dir: Path, **more: Any) -> None:
    """Add values to run.json."""
    before = remembered(run_dir)
    after = {"id": uuid.uuid4().hex[:8], **before, **more}
    if after != before:
        with whole_file(run_dir / "run.json") as file:
            file.write(json.dumps(after).encode())


def hold(run_dir: Path) -> None:
    """Lock the run for the life of this process. Raises UserError if another process holds the lock.

    A file server may keep the lock of a lost node, so the lock of an earlier start of the same SLURM job is ignored.
    """
    release()
    try:
        locks.append(locked(run_dir / LOCK))
    except BlockingIOError:
        if left_by_earlier_start(run_dir):
            return
        raise UserError(
            f"another process is training in {run_dir}: wait for its end or stop it, or start another run "
            f"(ckpt_path=null); if its machine is lost, remove {run_dir / LOCK}"
        ) from None


def release() -> None:
    while locks:
        locks.pop().close()


def finish(run_dir: Path, metric: Any) -> float | None:
    """Return the metric that a sweep minimises, and write it to run.json for the sweep's process."""
    value = None if metric is None else float(metric)
    note(run_dir, optimized=value)
    return value


def end_with_sweep() -> None:
    """Stop this job, as SIGTERM does, when the sweep's process ends and closes this one's input."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


class ConfigFile(L.Callback):
    """Writes the configuration, without secrets, to config.yaml and the loggers.

    It is written at the first batch, so that a refused resume leaves the old one.
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
