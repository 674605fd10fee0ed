"""Starts programs in forks of a process that has imported the libraries. Imports take most of the time of a short run.

Otherwise a program runs as from a shell. It has its own arguments, environment, working directory, output and exit code.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import TCPStore

LIBRARIES = [
    "lcm.evaluate.jobs",
    "lcm.app.cli",
    "lcm.evaluate.report",
    "lcm.runtime.run_dir",
    "lcm.data.datamodule",
    "lcm.data.workers",
    "lcm.modules.consistency",
    "lcm.modules.trainer",
    "lcm.models.text_to_image",
    "lcm.app.html_report",
    "lcm.callbacks.progress",
    "lcm.callbacks.samples",
    "lcm.callbacks.wandb_logger",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "torch._dynamo",
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


class Started:
    """A started program, with the part of `subprocess.Popen` that the tests need."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
        with mock.patch.dict(os.environ, env):  # libraries read variables when they are imported
            forkserver.ensure_running()
        self.args, self.out, self.err = command, out, err
        for file in (out, err):
            file.write_bytes(b"")  # remove the output of an earlier program
        self.process = context.Process(target=perform, args=(command[1:], cwd, env, out, err))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode


def run(command: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run `python [-m] program ...` as `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` does."""
    return finish([start(command, cwd, env)], timeout)[0]


def start(command: list[str], cwd: Path, env: dict[str, str], log: Path | None = None) -> Started:
    """Start a program in a session of its own. log: a file for its output and its errors."""
    out, err = (cwd.parent / f"{cwd.name}.{name}" for name in ("stdout", "stderr"))
    return Started(command, cwd, env, log or out, log or err)


def ranks(
    count: int, command: list[str], cwd: Path, env: dict[str, str], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Run a program as `torchrun --standalone --nproc-per-node=<count>` does. This process serves the rendezvous store."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    started = []
    for rank in range(count):
        variables = {**env, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(start(command, cwd, variables, cwd.parent / f"{cwd.name}.rank-{rank}"))
    done = finish(started, timeout)
    del store
    return done


def finish(started: list[Started], timeout: float) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all programs. If one fails, kill the others after 60 seconds. torchrun also kills the others."""
    processes = {program.process.sentinel: program for program in started}
    deadline = time.monotonic() + timeout
    while processes and time.monotonic() < deadline:
        for sentinel in connection.wait(list(processes), deadline - time.monotonic()):
            if processes.pop(sentinel).wait(60) != 0:
                deadline = min(deadline, time.monotonic() + 60)
    done = []
    for program in started:
        program.kill()
        code, out, err = program.wait(60), program.out.read_text(), program.err.read_text()
        if program in processes.values():
            raise subprocess.TimeoutExpired(program.args, timeout, out, err)
        done.append(subprocess.CompletedProcess(program.args, code, out, err))
    return done


def perform(args: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(1 if number == 2 and err == out else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # tempfile then reads TMPDIR of the new environment
    rank_zero_only.rank = int(env.get("RANK", 0))  # Lightning reads RANK only when it is imported
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits an ignored SIGINT
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
    code = 0
    try:
        if args[0] == "-m":
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # the interpreter does this at its end, but multiprocessing leaves it out
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
