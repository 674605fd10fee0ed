"""A run's directory: its identity, configuration and model."""

import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed import Store, rendezvous

from lcm.checkpoints.found import FOLDER, checkpoint_path, saved
from lcm.errors import UserError
from lcm.files import locked, remove, whole_file
from lcm.models.pipeline import is_consistency_model, training_facts
from lcm.redaction import redacted

LOCK = ".lock"
held: list[TextIO] = []


def start_run(cfg: DictConfig) -> Path:
    """The run's directory, the same for all ranks and restarts: `<runs>/<name>/<id>`.

    The id is the SLURM job's, or the next free number; `ckpt_path=last` goes on in the newest run that has a checkpoint.
    """
    parent = Path(cfg.paths.runs) / cfg.name
    if not cfg.name:
        raise UserError("name= is empty: a run's folder needs a name")
    run_id, job = cfg.paths.run_id, 0
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        job = HydraConfig.get().job.num
        run_id = None if run_id is None else f"{run_id}-{job}"  # one job of SLURM's may run a whole sweep
    try:
        if run_id is None and "TORCHELASTIC_RUN_ID" in os.environ:
            run_id = agreed(lambda: choose(parent, cfg.ckpt_path), job)
        elif run_id is None and "LOCAL_RANK" in os.environ:
            run_id = os.environ.get("LCM_RUN_ID")  # this process was launched by the one that chose
        run_dir = parent / str(choose(parent, cfg.ckpt_path) if run_id is None else run_id)
        run_dir.mkdir(parents=True, exist_ok=True)
        wandb_id = identify(run_dir)
    except OSError as error:
        raise UserError(
            f"cannot write the run directory under {parent} ({error.strerror}): set paths.runs to a writable folder"
        ) from None
    os.environ["LCM_RUN_ID"] = run_dir.name
    with open_dict(cfg):
        cfg.paths.run_dir, cfg.paths.wandb_id = str(run_dir), wandb_id
    return run_dir


def choose(parent: Path, ckpt_path: str | None) -> str:
    """The name of the newest run to go on with, or of a new one, whose folder is made."""
    if ckpt_path == "last":
        for number in reversed(run_numbers(parent)):
            if saved(parent / str(number) / FOLDER):
                return str(number)
    return next_run(parent).name


def agreed(choose: Callable[[], str], job: int) -> str:
    """What the first of torchrun's processes chooses; the others learn it there. A restart has the same store."""
    store, rank = meeting_place()
    key = f"run of job {job}, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        store.set(key, choose())
    return store.get(key).decode()


@cache
def meeting_place() -> tuple[Store, int]:
    """The store of torchrun's rendezvous, and this process' rank; kept, since the first process may be who serves it."""
    store, rank, _ = next(rendezvous("env://"))
    return store, rank


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def unless_refused(run_dir: Path) -> Iterator[None]:
    """What wrong input ends before a first step leaves no folder of a run that never was."""
    try:
        yield
    except (UserError, MisconfigurationException):
        remove_unbegun(run_dir)
        raise


@rank_zero_only
def remove_unbegun(run_dir: Path) -> None:
    if {path.name for path in run_dir.iterdir()} <= {"run.json", "config.yaml", LOCK}:
        remove(run_dir)


@rank_zero_only
def identify(run_dir: Path) -> str:
    """The run's id in wandb, kept in run.json from its first start on; None on other ranks, which write nothing."""
    hold(run_dir)
    for litter in list(run_dir.rglob("*.partial")):  # of a start that was killed
        remove(litter)
    identity = run_dir / "run.json"
    if not identity.is_file():
        with whole_file(identity) as file:
            file.write(json.dumps({"id": uuid.uuid4().hex[:8]}).encode())
    say(f"run:     {run_dir}")
    return json.loads(identity.read_text())["id"]


def hold(run_dir: Path) -> None:
    """Keep other processes out of this run as long as this one lives. Raises UserError while one is in it.

    SLURM's jobs have runs of their own, and a file server may keep the lock of a node that was lost.
    """
    held.clear()
    if "SLURM_JOB_ID" in os.environ:
        return
    try:
        held.append(locked(run_dir / LOCK))
    except BlockingIOError:
        raise UserError(
            f"another process is training in {run_dir}: wait for its end or stop it, or start a run of its own (ckpt_path=null)"
        ) from None


def run_numbers(parent: Path) -> list[int]:
    return sorted(int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit())


def next_run(parent: Path) -> Path:
    """Make the first free number's folder; two programs that start at once get two."""
    numbers = run_numbers(parent)
    for number in itertools.count(numbers[-1] + 1 if numbers else 0):
        try:
            (parent / str(number)).mkdir(parents=True)
            return parent / str(number)
        except FileExistsError:
            continue
    raise AssertionError("itertools.count ends")


def resume_path(cfg: DictConfig) -> str | None:
    """The checkpoint to go on from: a path, or for `last` the newest whole one of this run (a fresh start if there is none).

    A job that SLURM started again goes on with its own, if it has one, whatever it began from. Every rank reads the same files
    and comes to the same answer: none writes before all have started.
    """
    if "SLURM_RESTART_COUNT" in os.environ and saved(Path(cfg.paths.run_dir, FOLDER)):
        cfg.ckpt_path = "last"
    if cfg.ckpt_path is None:
        return None
    found = checkpoint_path(Path(cfg.paths.run_dir), cfg.ckpt_path)
    if found is None:
        say("start:   from the first step: this run has no checkpoint yet")
    return found


def write_config(cfg: DictConfig, trainer: Any) -> None:
    """Keep the run's configuration, without secrets, beside its results and in its loggers."""
    if trainer.is_global_zero:
        OmegaConf.save(redacted(OmegaConf.to_container(cfg)), Path(cfg.paths.run_dir, "config.yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams(redacted(OmegaConf.to_container(cfg, resolve=True)))


def is_student(pipeline: Path) -> bool:
    """Whether a saved model draws in a few steps: by consistency sampling, or after guided distillation."""
    return is_consistency_model(str(pipeline)) or "students" in training_facts(str(pipeline))


def find_pipeline(pipeline: str, runs: str) -> str:
    """A pipeline folder, hub id or "mini" as given; for "last" the newest model that a run under `runs` saved, a student before
    a teacher; for "last:<name>" the newest of the runs of that name."""
    last, _, name = pipeline.partition(":")
    if last != "last":
        return pipeline
    models = sorted(
        Path(runs).glob(f"{name or '*'}/*/model/model_index.json"),
        key=lambda file: (not name and is_student(file.parent), file.stat().st_mtime),
    )
    if not models:
        train = f"python train.py experiment={name}" if name else "python train.py"
        raise UserError(
            f"no run under {Path(runs, name)}/ has saved a model yet: run `{train}`, or set pipeline=<folder or hub id>"
        )
    return str(models[-1].parent)
