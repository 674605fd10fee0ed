"""Growing files: one thread of one process of a node writes, others read at the same time."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lcm.runtime.atomic_io import locked

POLL = 0.005  # seconds between two looks at a file that is waited for
WRITER_POLL = 0.05  # seconds between two looks of a writer that is ahead of its readers
starting = threading.Lock()  # held while a thread is started
writing: set[Path] = set()  # lock files that threads of this process hold: a POSIX lock does not exclude its own process


def reset() -> None:
    global starting
    starting = threading.Lock()
    writing.clear()


os.register_at_fork(after_in_child=reset)  # another thread of the parent may have held the lock; none lives on in the child


def start_writer(lock: Path, write: Callable[[], None]) -> threading.Thread | None:
    """Run `write` in a thread that holds a lock file. Return None if another thread or process holds it.

    The caller holds `starting`. Raises OSError if the lock file cannot be written.
    """
    if lock in writing:
        return None
    try:
        file = locked(lock)
    except BlockingIOError:
        return None
    writing.add(lock)

    def run() -> None:
        try:
            write()
        finally:
            with starting:
                file.close()
                writing.discard(lock)

    thread = threading.Thread(target=run, daemon=True, name=f"writes {lock.stem}")
    thread.start()
    return thread


class Asked:
    """The size of a growing file that readers have asked for, in this process and in the others of the node."""

    def __init__(self, file: Path) -> None:
        self.file, self.here, self.told = file, 0.0, 0.0
        self.is_own = False  # whether this object's process writes the file

    def add(self, extent: float) -> None:
        self.here = max(self.here, extent)

    def tell(self) -> None:
        """Send the request of a waiting reader to the writer's process."""
        if self.here > self.told and not self.is_own:
            self.told = self.here
            with suppress(OSError):
                self.file.write_text(str(self.here))

    def pause(self, extent: float, ahead: float, seconds: float) -> None:
        """Let the writer sleep while it is more than `ahead` before its readers, at most `seconds`."""
        until = time.monotonic() + seconds
        while extent > self.here + ahead and time.monotonic() < until:
            with suppress(OSError, ValueError):
                self.add(float(self.file.read_text()))
            time.sleep(WRITER_POLL)
