"""Sweeps: each job trains in a new process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from lcm.core.errors import UserError
from lcm.runtime.launch import child_environment, launcher
from lcm.runtime.run_dir import read_run_json, run_name, runs_folder


def check_sweep(folder: Path, one_process: bool) -> None:
    """Raise UserError if the sweep's folder cannot be written, or if a launcher started several processes."""
    name, _, processes = launcher()
    if one_process and processes > 1:
        raise UserError(
            f"{name} started {processes} processes, but a sweep starts the processes of its jobs itself: start one process "
            "with trainer=ddp trainer.devices=<processes of a job>"
        )
    if folder.is_dir() and os.access(folder, os.W_OK):
        return
    try:
        folder.mkdir(parents=True)
        folder.rmdir()  # Hydra makes the folder later, under another time
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}): set paths.runs to a writable folder") from None


def sweep_job(cfg: DictConfig) -> tuple[int, float | None]:
    """Train one job of a sweep in a new process. Return its exit code and its metric.

    A signal to the sweep is forwarded to the job. The sweep stops when the job stops on this signal.
    """
    run_dir = runs_folder(cfg) / run_name(cfg)
    with open_dict(cfg):
        cfg.paths.run_dir = str(run_dir)
    environment = os.environ | child_environment(run_dir)
    environment.pop("LOCAL_RANK", None)
    job = subprocess.Popen(job_command(), env=environment, stdin=subprocess.PIPE, start_new_session=True)
    with forwarded(job):
        code = job.wait()
    stopped = {128 + signum for signum in FORWARDED} | {-signum for signum in FORWARDED}
    if code in stopped:
        raise SystemExit(code if code > 0 else 128 - code)
    if code < 0:
        print(f"error: {signal.Signals(-code).name} ended the training in {run_dir}", file=sys.stderr, flush=True)
    return code, read_run_json(run_dir).get("optimized") if code == 0 else None


FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def forwarded(process: subprocess.Popen) -> Iterator[None]:
    """Forward signals to the process: a terminal sends them to this process's group only."""
    before = {signum: signal.signal(signum, lambda signum, frame: process.send_signal(signum)) for signum in FORWARDED}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def job_command() -> list[str]:
    """Return the command line of this one job."""
    options, overrides = get_args_parser().parse_args(sys.argv[1:]), HydraConfig.get().overrides
    spec = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if spec is None else ["-m", spec.name]
    for option in ("config_name", "config_dir"):
        if value := getattr(options, option):
            program.append(f"--{option.replace('_', '-')}={value}")
    job_overrides = [override for override in (*overrides.hydra, *overrides.task) if not override.startswith("hydra.mode=")]
    return [sys.executable, *program, *job_overrides, "hydra.mode=RUN"]
