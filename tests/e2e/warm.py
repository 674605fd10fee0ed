"""The programs, each in a process that is forked from one which has imported the libraries: that is most of a short run.

Otherwise it is as if started from a shell: own arguments, environment, working directory, output and exit code.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import traceback
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

LIBRARIES = [
    "lcm.evaluate.jobs",
    "lcm.app.cli",
    "lcm.evaluate.report",
    "lcm.runtime.run_dir",
    "lcm.data.datamodule",
    "lcm.data.workers",
    "lcm.modules.consistency",
    "lcm.callbacks.progress",
    "lcm.callbacks.samples",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


def run(command: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` of `python [-m] program ...`."""
    with mock.patch.dict(os.environ, env):  # what libraries read when they are imported
        forkserver.ensure_running()
    out, err = (cwd.parent / f"{cwd.name}.{name}" for name in ("stdout", "stderr"))
    process = context.Process(target=perform, args=(command[1:], cwd, env, out, err))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def perform(args: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
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
    threading._shutdown()  # what the interpreter does at its end, and multiprocessing leaves out
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
