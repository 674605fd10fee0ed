"""Signals that ask a run to stop: noted when they come, acted on between two batches by `lcm.runtime.stop`.

The standard library only: `train.py` listens before its other imports, which take seconds.
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

GRACE = 2.0  # seconds
_process = 0
_asked = 0


def listen(*signals: int) -> None:
    """Note these signals from now on, those too that were held back since before the program began (`env --block-signal`)."""
    global _process
    _process = os.getpid()
    for signum in signals:
        signal.signal(signum, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _note(signum: int, frame: FrameType | None) -> None:
    global _asked
    if os.getpid() != _process:  # a forked loader worker inherits the handler, and has nothing to save
        return
    if signum == SIGINT:
        if _asked:  # nothing is lost: what is being written has another name until it is whole
            signal.signal(SIGINT, SIG_DFL)
            os.kill(_process, SIGINT)
        print("\nstopping after this step with a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True)
    _asked = max(_asked, signum)


def asked() -> int:
    """The highest signal noted, 0 for none: SIGTERM, which ends a job, outranks SIGUSR1, after which it goes on."""
    return _asked


@contextmanager
def held_back() -> Iterator[None]:
    """For the start of loader workers, which inherit it: a signal waits until they know what to do with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {SIGINT, SIGTERM, SIGUSR1, SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """For a loader worker: only the process that started it may end it. SLURM signals every process of a job, a terminal every
    one in the foreground, and the main one still needs batches to come to the end of a step."""
    for signum in (SIGINT, SIGUSR1, SIGUSR2):  # the last is submitit's
        signal.signal(signum, SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    parent = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo"):
        while parent is None or signal.sigwaitinfo({SIGTERM}).si_pid != parent.pid:
            pass
    else:  # macOS does not say who sent it: the main process gets time for the end of its step
        signal.sigwait({SIGTERM})
        time.sleep(GRACE)
    os._exit(0)
