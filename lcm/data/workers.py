"""The worker processes of a loader, and the messages for a worker that dies or hangs."""

import errno
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lcm.core.errors import UserError
from lcm.data.left_out import take_left_out
from lcm.runtime import signals

DIED = "a data worker died: if memory ran out, set a smaller data.num_workers, data.shuffle or data.batch_size"
SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: enlarge it, as docker run --shm-size=16g does, or set a smaller data.batch_size, or "
    "data.num_workers=0, which needs none"
)


class Loader(DataLoader):
    """A DataLoader that waits no longer than `patience` seconds for a batch. Raises UserError.

    The DataLoader's own timeout is not enough. A worker that stops during the transfer of a batch blocks the reader
    forever. So does a worker that hangs during shutdown. Such workers are killed.
    """

    def __init__(self, stream: IterableDataset, *, num_workers: int, patience: float, pin_memory: bool = False) -> None:
        init = init_worker if num_workers else None
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=init,
            collate_fn=share if num_workers else None,
        )
        self.patience = patience

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with signals.held_back():
            batches = super().__iter__()
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            yield from batches
            return
        while True:
            try:
                with alarm(self.patience):
                    batch = next(batches)
            except StopIteration:
                return
            except (UserError, ConnectionError, EOFError) as error:
                kill(multiprocessing.active_children())
                # The iterator sets this event when it ends. A killed worker may have left the lock of the old event closed.
                batches._workers_done_event = threading.Event()  # type: ignore[attr-defined]
                if isinstance(error, UserError) or "in DataLoader worker process" in str(error):
                    raise
                raise UserError(DIED) from error  # the worker died during the transfer of a batch
            yield batch


def share(batch: Any) -> Any:
    """Move a batch to shared memory. torch would do it in a thread and only print its errors."""
    try:
        return {name: value.share_memory_() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise UserError(SHARED_MEMORY) from None
        raise


def kill(workers: list[Any]) -> None:
    """Kill workers with SIGKILL, which also ends stopped ones, and wait until they are gone.

    torch's SIGCHLD handler is muted: it would raise at the first dead worker and leave the other workers running.
    """
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGCHLD, before)


def init_worker(worker: int) -> None:
    """Set up a loader worker: one thread, and signals of the main process only."""
    signals.leave_to_parent()
    take_left_out()  # a fork inherits the counts of its parent's scans, which are not of this worker's shards
    torch.set_num_threads(1)
    sys.setswitchinterval(5e-4)  # so that a scan in a thread does not hold up decoding
    random.seed(worker)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise UserError in the main thread if the context takes longer than this."""

    def ring(*args: Any) -> None:
        raise UserError(
            f"no data came for {seconds:g} seconds: a worker, or the storage under data.shards, hangs (+data.timeout=<seconds> "
            "waits longer)"
        )

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def workers_watched() -> Iterator[None]:
    """Turn the RuntimeError that torch raises for a dead worker, at any place of the training, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker (pid"):
            raise UserError(SHARED_MEMORY if "Bus error" in str(error) else DIED) from error
        raise
