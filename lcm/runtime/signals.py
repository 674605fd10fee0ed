"""Signals to stop a run: recorded on arrival, handled between two batches by `lcm.runtime.stop`.

This module imports only the standard library: `train.py` listens before its other imports, which take seconds.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from types import FrameType

GRACE = 2.0  # seconds in which the main process finishes its step
_process = 0
_recorded = 0


def listen(*signals: int) -> None:
    """Record these signals from now on, also signals that a parent process has blocked (`env --block-signal`)."""
    global _process
    _process = os.getpid()
    for signum in signals:
        signal.signal(signum, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _note(signum: int, frame: FrameType | None) -> None:
    global _recorded
    if os.getpid() != _process:  # a forked loader worker inherits the handler
        return
    if signum == SIGINT:
        if _recorded:  # a kill is safe: an unfinished file has another name
            signal.signal(SIGINT, SIG_DFL)
            os.kill(_process, SIGINT)
        print("\nstopping after this step with a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True)
    _recorded = max(_recorded, signum)


def recorded_signal() -> int:
    """Return the highest recorded signal, 0 for none. SIGTERM, which ends a job, outranks SIGUSR1, which requeues it."""
    return _recorded


@contextmanager
def held_back() -> Iterator[None]:
    """Block signals. Loader workers that start meanwhile inherit the block, until they set their own handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {SIGINT, SIGTERM, SIGUSR1, SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Obey only the signals of the main process. Called in a loader worker.

    SLURM signals every process of a job, and a terminal every process in the foreground. The main process still needs batches
    to finish its step.
    """
    for signum in (SIGINT, SIGUSR1, SIGUSR2):  # submitit sends SIGUSR2
        signal.signal(signum, SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    parent = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo"):
        while parent is None or signal.sigwaitinfo({SIGTERM}).si_pid != parent.pid:
            pass
    else:  # the sender is unknown on macOS
        signal.sigwait({SIGTERM})
        time.sleep(GRACE)
    os._exit(0)
