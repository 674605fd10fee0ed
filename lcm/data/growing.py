"""Growing files: one thread of one process of a node writes the file, other threads and processes read it meanwhile."""

import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lcm.runtime.atomic_io import locked

POLL = 0.005  # seconds between two looks of a reader that waits
WRITER_POLL = 0.05  # seconds between two looks of a writer that waits for its readers
starting = threading.Lock()  # guards the module's and the writers' state
writing: set[Path] = set()  # lock files that threads of this process hold: a POSIX lock does not exclude its own process


def reset() -> None:
    global starting
    starting = threading.Lock()
    writing.clear()


os.register_at_fork(after_in_child=reset)  # a thread of the parent may hold the lock; a fork has no other threads


class RequestedSize:
    """The size of a growing file that readers of all processes of the node request.

    file: the file by which another process sends its request to the writer's process.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.size, self.sent = file, 0.0, 0.0
        self.is_writer = False  # whether this process writes the growing file

    def add(self, size: float) -> None:
        """Request `size` bytes."""
        self.size = max(self.size, size)

    def send(self) -> None:
        """Send this process's request to the writer's process."""
        if self.size > self.sent and not self.is_writer:
            self.sent = self.size
            with suppress(OSError):
                self.file.write_text(str(self.size))

    def pause(self, size: int, ahead: int, seconds: float) -> None:
        """Let the writer sleep while its `size` is more than `ahead` bytes above the request, at most `seconds`."""
        until = time.monotonic() + seconds
        while size > self.size + ahead and time.monotonic() < until:
            with suppress(OSError, ValueError):
                self.add(float(self.file.read_text()))
            time.sleep(WRITER_POLL)


class GrowingFile:
    """A file that is read while it is written. The writer fills `part`, and renames `part` to `path` when it is whole.

    A subclass writes the file by its method `write`. The first process of the node that needs the file becomes its writer.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, path.with_suffix(".lock")
        self.part = path.with_suffix(".part")  # not .partial: `whole_file` uses that name
        self.requested = RequestedSize(path.with_suffix(".asked"))
        self.file: BinaryIO | None = None
        self.arrived, self.whole = 0, False  # bytes that can be read, and whether the file is complete
        self.failure: Exception | None = None

    def write(self) -> None:
        """Write the file to `part` and rename it to `path`."""
        raise NotImplementedError

    def ensure(self) -> None:
        """Start the writer unless one is running. Raises the error of a failed writer."""
        with starting:
            if self.failure is not None:
                raise self.failure
            if self.lock not in writing and not self.path.exists():
                self._start()

    def _start(self) -> None:
        """Start the writer unless another process writes. Raises OSError if the lock file cannot be written."""
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock_handle = locked(self.lock)
        except BlockingIOError:
            return
        writing.add(self.lock)
        self.requested.is_writer = True

        def run() -> None:
            try:
                if not self.path.exists():
                    self.write()
            except Exception as error:
                self.failure = error
            finally:
                with suppress(OSError):
                    self.requested.file.unlink()
                with starting:
                    lock_handle.close()
                    writing.discard(self.lock)

        threading.Thread(target=run, daemon=True, name=f"writes {self.path.name}").start()

    def _look(self) -> None:
        """Open the file and update `arrived`."""
        whole = self.path.exists()
        if self.file is not None and os.fstat(self.file.fileno()).st_nlink == 0:
            self.close()  # the file was removed, or its writer was killed: it is written again
        if self.file is None:
            with suppress(FileNotFoundError):
                self.file = open(self.path if whole else self.part, "rb")  # noqa: SIM115 - closed by `close`
        if self.file is not None:
            self.arrived, self.whole = os.fstat(self.file.fileno()).st_size, whole

    def wait_for(self, size: float) -> None:
        """Wait for `size` bytes or for the whole file. Raises the error of a failed writer."""
        self.requested.add(size)
        while not self.whole and self.arrived < size:
            self._look()
            if self.whole or self.arrived >= size:
                return
            self.ensure()
            self.requested.send()
            time.sleep(POLL)

    def read(self, start: int, size: int) -> bytes:
        """Wait for `size` bytes from `start` on, and return them; fewer only at the end of the whole file."""
        self.wait_for(start + size)
        assert self.file is not None
        return os.pread(self.file.fileno(), size, start)

    def size(self) -> int:
        """Wait for the whole file, and return its bytes."""
        self.wait_for(math.inf)
        return self.arrived

    def close(self) -> None:
        """Close the file. It is opened again when it is read."""
        if self.file is not None:
            self.file.close()
        self.file, self.arrived, self.whole = None, 0, False
