"""A run's directory: its identity, configuration and model."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import lightning as L
import torch
import torch.distributed as dist
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed import Store, rendezvous

from lcm.checkpoints.found import FOLDER, checkpoint_path, saved
from lcm.errors import UserError
from lcm.files import digest, locked, remove, whole_file
from lcm.models.pipeline import facts_in
from lcm.redaction import redacted
from lcm.strategies.slurm import meet_in_step

LOCK = ".lock"
MODELS = ("pipeline", "model")  # keys that name one; it is a folder, a hub id, mini, last or last:<name>
STARTED = {"run.json", "config.yaml", LOCK}  # all that a run's folder holds before its first step
held: list[TextIO] = []
trained: list[Path] = []  # the runs of this process that have ended


class Launcher(NamedTuple):
    """The program that started this process as one of several."""

    name: str
    rank: int
    processes: int


def launcher() -> Launcher:
    """Return torchrun, srun or mpirun with this process's rank; a process started alone is rank 0 of 1."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # Lightning's own launcher sets no RANK
        return Launcher("torchrun", int(env["RANK"]), int(env["WORLD_SIZE"]))
    if "OMPI_COMM_WORLD_SIZE" in env:
        return Launcher("mpirun", int(env.get("OMPI_COMM_WORLD_RANK", 0)), int(env["OMPI_COMM_WORLD_SIZE"]))
    rank = int(env.get("SLURM_PROCID", 0))
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS") if rank else None)  # a batch script is rank 0 of no step
    if tasks is not None:
        return Launcher("srun", rank, int(tasks))
    return Launcher("mpirun", int(env.get("PMI_RANK", 0)), int(env.get("PMI_SIZE", 1)))


def check_processes(trainer: DictConfig) -> None:
    """Raise UserError where the processes that were started are not those that the trainer counts on."""
    name, _, processes = launcher()
    devices, nodes = device_count(trainer), trainer.num_nodes
    wanted = f"trainer.devices={trainer.devices} and trainer.num_nodes={nodes} make {devices * nodes}"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning then joins no processes of srun's
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
        raise UserError(f"srun --ntasks={processes} leaves open who is where: use --ntasks-per-node and trainer=slurm")
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


def agreed(choose: Callable[[], str]) -> str:
    """Return the choice of the first of torchrun's or srun's processes; the others learn it in the store where they meet.

    torchrun keeps its store over restarts. The first process's error is every process's.
    """
    if launcher().processes == 1:
        return choose()
    store, rank = meeting_place()
    key = f"run {len(trained)}, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        try:
            store.set(key, f"run {choose()}")
        except UserError as error:
            store.set(key, f"error {error}")
    outcome, _, text = store.get(key).decode().partition(" ")
    if launcher().name == "srun":  # where rank 0 serves the store until all have read
        store.set(f"{key}, rank {rank}", "")
        store.wait([f"{key}, rank {other}" for other in range(launcher().processes)])
    if outcome == "error":
        raise UserError(text)
    return text


@cache
def meeting_place() -> tuple[Store, int]:
    """Return the rendezvous' store and this process's rank; the store is kept, since the first process may be who serves it."""
    name, rank, processes = launcher()
    if name == "srun":
        meet_in_step()
    store, rank, _ = next(rendezvous(f"env://?rank={rank}&world_size={processes}"))
    return store, rank


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


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)


@rank_zero_only
def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


def check_sweep(folder: Path, one_process: bool) -> None:
    """Raise UserError where no sweep can start: it needs a folder, and trainings one first process."""
    name, _, processes = launcher()
    if one_process and processes > 1:
        raise UserError(
            f"{name} started {processes} processes of a sweep, which starts those of its jobs itself: start one process with "
            "trainer=ddp trainer.devices=<processes of a job>"
        )
    if folder.is_dir() and os.access(folder, os.W_OK):
        return
    try:
        folder.mkdir(parents=True)
        folder.rmdir()  # Hydra makes it, under the name of another moment
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}): set paths.runs to a writable folder") from None


def sweep_job(cfg: DictConfig) -> tuple[int, float | None]:
    """Train one of a sweep's jobs in a process of its own, whose environment, process group and memory end with it.

    Returns its exit code and its metric. A signal to the sweep goes to the job; when the job stops by it, so does the sweep.
    """
    run_dir = runs_folder(cfg) / run_name(cfg)
    with open_dict(cfg):
        cfg.paths.run_dir = str(run_dir)
    environment = os.environ | told_to_children(run_dir)
    environment.pop("LOCAL_RANK", None)
    job = subprocess.Popen(job_command(), env=environment, stdin=subprocess.PIPE, start_new_session=True)
    with forwarded(job):
        code = job.wait()
    stopped = {128 + signum for signum in FORWARDED} | {-signum for signum in FORWARDED}
    if code in stopped:
        raise SystemExit(code if code > 0 else 128 - code)
    if code < 0:
        print(f"error: {signal.Signals(-code).name} ended the training in {run_dir}", file=sys.stderr, flush=True)
    return code, remembered(run_dir).get("optimized") if code == 0 else None


def end_with_sweep() -> None:
    """Stop this job as SIGTERM does when the sweep's process is gone, which has the other end of this one's input."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def forwarded(process: subprocess.Popen) -> Iterator[None]:
    """Hand on signals, which a terminal sends to this process's group alone."""
    before = {signum: signal.signal(signum, lambda signum, frame: process.send_signal(signum)) for signum in FORWARDED}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def job_command() -> list[str]:
    """Return the command line that trains this job of the sweep alone."""
    options, given = get_args_parser().parse_args(sys.argv[1:]), HydraConfig.get().overrides
    spec = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if spec is None else ["-m", spec.name]
    for option in ("config_name", "config_dir"):
        if value := getattr(options, option):
            program.append(f"--{option.replace('_', '-')}={value}")
    kept = [override for override in (*given.hydra, *given.task) if not override.startswith("hydra.mode=")]
    return [sys.executable, *program, *kept, "hydra.mode=RUN"]


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
        if runs := resumable(Path(cfg.paths.runs), cfg.name):
            warn(
                f"warning: ckpt_path=last found no checkpoint of {cfg.name}: training starts anew; runs with checkpoints are "
                f"{', '.join(runs)}: stop this one and give name=, or paths.run_id=, to go on with one of them"
            )
    return found


def resumable(runs: Path, name: str) -> list[str]:
    """Return the runs that have a checkpoint, as `<name>/<id>`, up to five, those of the nearest names first."""
    folders = {path.parent.parent for path in runs.glob(f"*/*/{FOLDER}/*.ckpt")}
    newest = sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    newest.sort(key=lambda folder: SequenceMatcher(None, folder.parent.name, name).ratio(), reverse=True)
    return [f"{folder.parent.name}/{folder.name}" for folder in newest[:5]]


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


def resolve_models(node: Any, runs: str) -> None:
    """Replace "last" and "last:<name>" in a configuration by the folder, so that a resumed run goes on with the same model."""
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_config(node[key]):
            resolve_models(node[key], runs)
        elif key in MODELS and isinstance(node[key], str):
            node[key] = chosen(node[key], runs, os.getcwd())


@cache
def chosen(pipeline: str, runs: str, working_directory: str) -> str:
    """`find_pipeline`, the same for all jobs of a sweep, which save models themselves."""
    return find_pipeline(pipeline, runs)


def is_student(pipeline: Path) -> bool:
    """Whether a saved model draws in a few steps: by consistency sampling, or after guided distillation."""
    facts = facts_in(pipeline)
    return facts["sampler"] != "ddim" or "students" in facts


def find_pipeline(pipeline: str, runs: str) -> str:
    """A pipeline folder, hub id or "mini" as given; for "last" the newest model that a run under `runs` saved, a student before
    a teacher; for "last:<name>" the newest of the runs of that name."""
    last, _, name = pipeline.partition(":")
    files = sorted(Path(runs).glob("*/*/model/model_index.json"), key=lambda file: file.stat().st_mtime)
    names = [file.parts[-4] for file in files]
    if last != "last":
        if pipeline in names and not Path(pipeline).is_dir():
            raise UserError(f"there is no folder {pipeline!r}: the newest model of the run {pipeline} is last:{pipeline}")
        return pipeline
    models = [file.parent for file, run in zip(files, names, strict=True) if not name or run == name]
    if not models:
        known = [f"last:{run}" for run in dict.fromkeys(reversed(names))][:10]
        cure = f"give {' or '.join(known)}" if known else "train one by `python train.py`"
        run = f"no run called {name}" if name else "no run"
        raise UserError(f"{run} under {runs}/ has saved a model: {cure}, or give a folder, a hub id (owner/name) or mini")
    students = [] if name else [model for model in models if is_student(model)]
    return str((students or models)[-1])
