"""A run's directory: its identity, configuration and model."""

import itertools
import json
import os
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
from lcm.runtime.launch import agreed, launcher, meeting_place, say, trained
from lcm.runtime.redaction import redacted
from lcm.runtime.resume import FOLDER, saved

LOCK = ".lock"
STARTED = {"run.json", "config.yaml", LOCK}  # all that a run's folder holds before its first step
held: list[TextIO] = []


def start_run(cfg: DictConfig) -> Path:
    """Make the run's directory `<runs>/<name>/<id>`, the same for all ranks and restarts, and this run's alone.

    The id is paths.run_id, or the SLURM job's, or the next free number. `ckpt_path=last` goes on in the newest run that has a
    checkpoint.
    """
    if launcher().processes == 1 and not is_told():
        os.environ.pop("LOCAL_RANK", None)  # left by another training, Lightning would wait for ranks that nobody starts
    if is_told() and "LOCAL_RANK" not in os.environ:
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
        raise UserError("name= is empty: a run's folder needs a name")
    return Path(cfg.paths.runs) / str(cfg.name)


@contextmanager
def writable(cfg: DictConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run directory under {runs_folder(cfg)} ({error.strerror}): set paths.runs to a writable folder"
        ) from None


def told_to_children(run_dir: Path) -> dict[str, str]:
    """Return the environment by which the processes that this one starts join its run."""
    return {"LCM_RUN_ID": run_dir.name, "LCM_RUN_PROCESS": str(os.getpid())}


def is_told() -> bool:
    return os.environ.get("LCM_RUN_PROCESS") == str(os.getppid())


def run_name(cfg: DictConfig) -> str:
    """Return the name of the run's folder, which exists then. One process chooses it, the others are told."""
    if is_told():
        return os.environ["LCM_RUN_ID"]

    def chosen() -> str:
        with writable(cfg):
            return choose(runs_folder(cfg), cfg.ckpt_path, cfg.paths.run_id)

    return agreed(chosen)


def choose(parent: Path, ckpt_path: str | None, run_id: str | None = None) -> str:
    """Return the name of a new run, whose folder is made, or of the run to go on with.

    Runs that go on are those of `ckpt_path=last` and those of a SLURM job's earlier start with the same command.
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
        say(f"start:   a new run: {parent / abandoned[0]} is of another command, paths.run_id={abandoned[0]} goes on with it")
    return new_run(parent, job)


def given(parent: Path, name: str, ckpt_path: str | None) -> str:
    """Return paths.run_id as a run's name, in a sweep with the job's number. Raises UserError where it would be overwritten."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        name = f"{name}-{HydraConfig.get().job.num}"
    run_dir = parent / name
    run_dir.mkdir(exist_ok=True)
    goes_on = ckpt_path == "last" or (ckpt_path and run_dir.resolve() in Path(ckpt_path).resolve().parents)
    if begun(run_dir) and not goes_on and not left_by_earlier_start(run_dir):
        raise UserError(f"{run_dir} holds a run: go on with it by ckpt_path=last, or choose another paths.run_id")
    return name


def run_names(parent: Path, job: str | None = None) -> list[str]:
    """Return the names of the runs that are numbered or a SLURM job's, of all jobs or this one, the oldest first."""
    names = [path.name for path in parent.glob("[0-9]*") if re.fullmatch(rf"{job or '[0-9]+'}(-[0-9]+)?", path.name)]
    return sorted(names, key=lambda name: [int(number) for number in name.split("-")])


def new_run(parent: Path, job: str | None = None) -> str:
    """Make the first free folder, of the SLURM job's name or the next number; two programs that start at once get two."""
    free: Iterator[str]
    if job is None:
        numbers = [int(name.partition("-")[0]) for name in run_names(parent)]
        free = map(str, itertools.count(numbers[-1] + 1 if numbers else 0))
    else:
        free = itertools.chain([job], (f"{job}-{number}" for number in itertools.count(1)))
    for name in free:
        try:
            (parent / name).mkdir()
            return name
        except FileExistsError:
            continue
    raise AssertionError("itertools.count ends")


def remembered(run_dir: Path) -> dict[str, Any]:
    """Return what run.json says of the run."""
    file = run_dir / "run.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def left_by_earlier_start(run_dir: Path) -> bool:
    """Whether an earlier start of this SLURM job trained here: SLURM has ended it."""
    start = remembered(run_dir).get("slurm", [run_dir.name.partition("-")[0], 0])  # None: not under SLURM
    return start is not None and start[0] == os.environ.get("SLURM_JOB_ID") and start[1] < restarts()


def restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def command() -> dict[str, str]:
    """Return digests of the overrides, which may hold secrets: of all, and of those that say what is trained."""
    whole = sorted(override for override in overrides() if not override.startswith("paths.run_id="))
    settings = [override for override in whole if re.match(r"[+~]*(name|seed|experiment|model|data)[./=@]", override)]
    return {"command": digest(whole), "settings": digest(settings)}


def overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def begun(run_dir: Path) -> bool:
    return not {path.name for path in run_dir.iterdir()} <= STARTED


@contextmanager
def training(run_dir: Path) -> Iterator[None]:
    """Leave nothing of this training to the next in this process, and no folder of a run that had no first step.

    Lightning's launcher leaves LOCAL_RANK, WORLD_SIZE and MASTER_PORT in the environment, and the process group.
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
    if not begun(run_dir):
        remove(run_dir)


@rank_zero_only
def identify(run_dir: Path) -> str:
    """Return the run's id in wandb, kept in run.json from its first start on; None on other ranks, which write nothing."""
    run_dir.mkdir(parents=True, exist_ok=True)
    hold(run_dir)
    for litter in list(run_dir.rglob("*.partial")):  # of a start that was killed
        remove(litter)
    job = os.environ.get("SLURM_JOB_ID")
    note(run_dir, **command(), slurm=None if job is None else [job, restarts()])
    say(f"run:     {run_dir}")
    return remembered(run_dir)["id"]


@rank_zero_only
def note(run_dir: Path, **more: Any) -> None:
    """Remember this of the run in run.json."""
    known = remembered(run_dir)
    noted = {"id": uuid.uuid4().hex[:8], **known, **more}
    if noted != known:
        with whole_file(run_dir / "run.json") as file:
            file.write(json.dumps(noted).encode())


def hold(run_dir: Path) -> None:
    """Keep other processes out of this run as long as this one lives. Raises UserError while one is in it.

    A file server may keep the lock of a node that was lost: an earlier start of the same SLURM job holds nothing.
    """
    release()
    try:
        held.append(locked(run_dir / LOCK))
    except BlockingIOError:
        if left_by_earlier_start(run_dir):
            return
        raise UserError(
            f"another process is training in {run_dir}: wait for its end or stop it, or start a run of its own "
            f"(ckpt_path=null); if its machine is lost, remove {run_dir / LOCK}"
        ) from None


def release() -> None:
    while held:
        held.pop().close()


def finish(run_dir: Path, metric: Any) -> float | None:
    """Return the metric that a sweep minimises, and keep it for the sweep's own process."""
    value = None if metric is None else float(metric)
    note(run_dir, optimized=value)
    return value


def end_with_sweep() -> None:
    """Stop this job as SIGTERM does when the sweep's process is gone, which has the other end of this one's input."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


class ConfigFile(L.Callback):
    """Keeps the run's configuration, without secrets, beside its results and in its loggers.

    Written at the first batch: a resume that is refused leaves the configuration of what was run.
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
