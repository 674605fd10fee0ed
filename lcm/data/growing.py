"""Growing files: one thread of one process of a node writes, others read at the same time."""

import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

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


class Asked:
    """The size of a growing file that readers have asked for, in this process and in the others of the node."""

    def __init__(self, file: Path) -> None:
        self.file, self.here, self.told = file, 0.0, 0.0
        self.is_own = False  # whether this object's process writes the file

    def add(self, size: float) -> None:
        self.here = max(self.here, size)

    def tell(self) -> None:
        """Send the request of a waiting reader to the writer's process."""
        if self.here > self.told and not self.is_own:
            self.told = self.here
            with suppress(OSError):
                self.file.write_text(str(self.here))

    def pause(self, size: int, ahead: int, seconds: float) -> None:
        """Let the writer sleep while it is more than `ahead` bytes before its readers, at most `seconds`."""
        until = time.monotonic() + seconds
        while size > self.here + ahead and time.monotonic() < until:
            with suppress(OSError, ValueError):
                self.add(float(self.file.read_text()))
            time.sleep(WRITER_POLL)


class GrowingFile:
    """A file that is read while it is written. Its writer fills `part`, which is renamed to `path` when it is whole.

    A subclass writes the file by its method `write`. Whichever process of the node needs the file first is its writer.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, path.with_suffix(".lock")
        self.part = path.with_suffix(".part")  # not .partial: `whole_file` uses that name
        self.asked = Asked(path.with_suffix(".asked"))
        self.file: BinaryIO | None = None
        self.arrived, self.whole = 0, False  # bytes that can be read, and whether these are all
        self.failure: Exception | None = None

    def write(self) -> None:
        """Write the file to `part` and rename it to `path`."""
        raise NotImplementedError

    def ensure(self) -> None:
        """Start the writer unless one is running. Raises the error of a failed one."""
        with starting:
            if self.failure is not None:
                raise self.failure
            if self.lock not in writing and not self.path.exists():
                self._start()

    def _start(self) -> None:
        """Start the writer unless another process has one. Raises OSError if the lock file cannot be written."""
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = locked(self.lock)
        except BlockingIOError:
            return
        writing.add(self.lock)
        self.asked.is_own = True

        def run() -> None:
            try:
                if not self.path.exists():
                    self.write()
            except Exception as error:
                self.failure = error
            finally:
                with suppress(OSError):
                    self.asked.file.unlink()
                with starting:
                    held.close()
                    writing.discard(self.lock)

        threading.Thread(target=run, daemon=True, name=f"writes {self.path.name}").start()

    def _look(self) -> None:
        """Open the file and update `arrived`."""
        whole = self.path.exists()
        if self.file is not None and os.fstat(self.file.fileno()).st_nlink == 0:
            self.close()  # its writer was killed or it was removed, and it is written again
        if self.file is None:
            with suppress(FileNotFoundError):
                self.file = open(self.path if whole else self.part, "rb")  # noqa: SIM115 - closed by `close`
        if self.file is not None:
            self.arrived, self.whole = os.fstat(self.file.fileno()).st_size, whole

    def wait_for(self, size: float) -> None:
        """Wait for `size` bytes or for the whole file. Raises the error of a failed writer."""
        self.asked.add(size)
        while not self.whole and self.arrived < size:
            self._look()
            if self.whole or self.arrived >= size:
                return
            self.ensure()
            self.asked.tell()
            time.sleep(POLL)

    def read(self, start: int, size: int) -> bytes:
        self.wait_for(start + size)
        assert self.file is not None
        return os.pread(self.file.fileno(), size, start)

    def size(self) -> int:
        self.wait_for(math.inf)
        return self.arrived

    def close(self) -> None:
        """Close the file. It is opened again when it is read."""
        if self.file is not None:
            self.file.close()
        self.file, self.arrived, self.whole = None, 0, False
