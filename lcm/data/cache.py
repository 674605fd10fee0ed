"""Remote shards on this machine: a cache of files that can be read while they arrive."""

import contextlib
import hashlib
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from lcm.core.errors import UserError
from lcm.core.numbers import Count, NonNegative, Positive
from lcm.data.urls import scheme_of
from lcm.runtime.atomic_io import NO_HANDLES, TRANSIENT, locked, os_error
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
FIRST_PART, LARGEST_PART = 2**18, 2**22  # bytes of a request: the first samples arrive soon, later ones at full rate
AHEAD = 2**21  # bytes of a file that arrive before they are asked for; then a part arrives each `PAUSE` seconds
PAUSE = 1.0
POLL = 0.005  # seconds between two looks at a file that another thread or process writes
starting = threading.Lock()  # held while a thread is started
writing: set[Path] = set()  # lock files that threads of this process hold: a POSIX lock does not exclude its own process


def reset() -> None:
    global starting
    starting = threading.Lock()
    writing.clear()


os.register_at_fork(after_in_child=reset)  # another thread of the parent may have held the lock; none lives on in the child


def start_writer(lock: Path, write: Callable[[], None]) -> threading.Thread | None:
    """Run `write` in a thread that holds a lock file. Return None while another thread or process holds it.

    Called with `starting` held. Raises OSError where the lock file cannot be written.
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
    """The extent of a growing file that is asked for, by this process and by others of the node that wait for it."""

    def __init__(self, file: Path) -> None:
        self.file, self.here, self.told = file, 0.0, 0.0
        self.is_own = False  # whether this object's process writes the file

    def add(self, extent: float) -> None:
        self.here = max(self.here, extent)

    def tell(self) -> None:
        """Tell the process that writes the file. Called by a process that waits."""
        if self.here > self.told and not self.is_own:
            self.told = self.here
            with suppress(OSError):
                self.file.write_text(str(self.here))

    def pause(self, extent: float, ahead: float, seconds: float) -> None:
        """Sleep until a file of this extent is less than `ahead` before its readers, but no longer than `seconds`."""
        until = time.monotonic() + seconds
        while extent > self.here + ahead and time.monotonic() < until:
            with suppress(OSError, ValueError):
                self.add(float(self.file.read_text()))
            time.sleep(POLL)


class TooLarge(OSError):
    """A file does not end where it should."""


class Differs(OSError):
    """A whole file differs from its manifest."""


class GrowingFile:
    """A file of the cache, which another thread or process may still be writing."""

    def __init__(self, arrival: "Arrival") -> None:
        self.arrival, self.whole, self.arrived = arrival, False, 0
        self.file: BinaryIO | None = None
        self.path = str(arrival.path)

    def _look(self) -> None:
        """Open the file, and learn how much of it has arrived."""
        whole = self.arrival.path.exists()
        if self.file is not None and os.fstat(self.file.fileno()).st_nlink == 0:
            self.close()  # it is fetched again
        if self.file is None:
            with suppress(FileNotFoundError):
                self.file = open(self.arrival.path if whole else self.arrival.partial, "rb")  # noqa: SIM115
        if self.file is not None:
            self.arrived, self.whole = os.fstat(self.file.fileno()).st_size, whole

    def _wait(self, size: int | None) -> None:
        """Wait until `size` bytes have arrived, or all (None). Raises OSError when the file cannot be fetched."""
        while not self.whole and (size is None or self.arrived < size):
            self._look()
            if self.whole or (size is not None and self.arrived >= size):
                return
            self.arrival.ensure()
            self.arrival.asked.tell()
            time.sleep(POLL)

    def read(self, start: int, size: int) -> bytes:
        self.arrival.asked.add(start + size)
        self._wait(start + size)
        assert self.file is not None
        return os.pread(self.file.fileno(), size, start)

    def size(self) -> int:
        self.arrival.asked.add(math.inf)
        self._wait(None)
        return self.arrived

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class Arrival:
    """One remote shard on its way into the cache. One thread of one process of the node fetches it."""

    def __init__(self, cache: "ShardCache", url: str, flaw: Callable[[str], str | None]) -> None:
        self.cache, self.url, self.flaw = cache, url, flaw
        name = cache.folder / hashlib.sha256(url.encode()).hexdigest()[:32]
        self.path, self.partial = name.with_suffix(".tar"), name.with_suffix(".partial")
        self.lock, self.failed = name.with_suffix(".lock"), name.with_suffix(".failed")
        self.asked = Asked(name.with_suffix(".asked"))  # in bytes
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def ensure(self) -> None:
        """Start to fetch the file unless this or another process does. Raises the error of a fetch that failed."""
        with starting:
            self._ensure()

    def _ensure(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.path.exists() or (self.thread is not None and self.thread.is_alive()):
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.failed.stat().st_mtime >= self.cache.started:  # by another process of this training
                raise OSError(self.failed.read_text())
        try:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            self.thread = start_writer(self.lock, self._fetch)
            self.asked.is_own = self.asked.is_own or self.thread is not None
        except OSError as error:
            if error.errno in TRANSIENT:
                raise
            raise UserError(
                f"cannot write to {self.cache.folder} ({error.strerror}): set data.cache.folder or paths.data to a writable "
                "folder"
            ) from None

    def _fetch(self) -> None:
        try:
            if not self.path.exists():
                self._download()
        except Exception as error:
            self.failure = error
            with suppress(OSError):
                self.failed.write_text(str(error))
        finally:
            self.asked.file.unlink(missing_ok=True)

    def _download(self) -> None:
        """Write the file piece by piece. A failed piece is requested again, after a growing pause."""
        attempt, reached = 1, 0
        while True:
            try:
                with self.partial.open("wb" if scheme_of(self.url) == "pipe" else "ab") as file:
                    for part in parts(self.url, file.tell(), self.cache.timeout):
                        check_size(file.tell() + len(part), self.cache.max_gb * 1e9)
                        file.write(part)
                        file.flush()
                        self.asked.pause(file.tell(), AHEAD, PAUSE)
                if wrong := self.flaw(str(self.partial)):
                    self.partial.unlink()
                    raise Differs(wrong)
                break
            except Exception as error:  # a file system's client raises errors of many kinds
                if failure := os_error(error, NO_HANDLES):
                    raise OSError(failure.errno, failure.strerror) from error
                with suppress(FileNotFoundError):
                    if (size := self.partial.stat().st_size) > reached:
                        attempt, reached = 1, size  # more of it came than before: attempts are counted in a row
                message = f"{redacted(self.url)}: {type(error).__name__}: {str(error).replace(self.url, redacted(self.url))}"
                if attempt == self.cache.attempts or isinstance(error, ImportError | TooLarge):
                    self.partial.unlink(missing_ok=True)
                    raise OSError(message) from None
                log.warning("attempt %d of %d failed, %s", attempt, self.cache.attempts, message)
                time.sleep(self.cache.pause * 2 ** (attempt - 1))
                attempt += 1
        self.cache.make_room(self.partial.stat().st_size)
        self.partial.rename(self.path)


class ShardCache:
    """A folder of at most about `max_gb` gigabytes for remote shards. The shards used longest ago make room.

    A request is tried `attempts` times, with pauses of 1, 2, 4, ... times `pause` seconds. timeout: seconds without data that
    count as a failure. Files are named by the digest of the whole URL.
    """

    def __init__(
        self, folder: str, *, max_gb: Positive = 50.0, attempts: Count = 5, pause: NonNegative = 1.0, timeout: Positive = 60.0
    ):
        self.folder, self.max_gb = Path(folder), max_gb
        self.attempts, self.pause, self.timeout = attempts, pause, timeout
        self.started = time.time()
        self.arrivals: dict[str, Arrival] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "arrivals": {}}  # a worker that is spawned, as on macOS, has its own threads

    def open(self, url: str, flaw: Callable[[str], str | None] = lambda file: None) -> GrowingFile:
        """Return the file of `url`, which arrives from now on. Raises OSError and UserError as `Arrival.ensure` does.

        flaw: tells how a whole file differs from its manifest. Such a file is fetched again.
        """
        arrival = self.arrivals.setdefault(url, Arrival(self, url, flaw))
        arrival.ensure()
        with suppress(OSError):
            os.utime(arrival.path)  # used now: it makes room last
        return GrowingFile(arrival)

    def make_room(self, size: int) -> None:
        """Remove the shards that were used longest ago, so that `size` more bytes fit."""
        files: list[tuple[os.stat_result, Path]] = []
        for file in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                files.append((file.stat(), file))
        total = size
        for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime, reverse=True):
            total += stat.st_size
            if total > self.max_gb * 1e9:
                file.unlink(missing_ok=True)  # processes that have it open can read on


def check_size(size: int, limit: float) -> None:
    if size > limit:
        raise TooLarge(f"it is larger than {limit / 1e9:g} GB, all that the cache may hold (its max_gb)")


def parts(url: str, start: int, timeout: float) -> Iterator[bytes]:
    """Yield the content of a URL from byte `start` on, in growing parts. Raises the errors of the file system's client."""
    if scheme_of(url) == "pipe":
        yield from output_of(url.partition(":")[2], timeout)
        return
    files, name = connect(url, timeout)
    length = FIRST_PART
    if url.startswith("http"):
        # One byte twice, since a server refuses a range behind the end. One that ignores ranges sends the whole.
        headers = {"Range": f"bytes={max(start - 1, 0)}-{start + length - 1}", "Accept-Encoding": "identity"}
        with contextlib.closing(files.open(name, block_size=0, size=1, headers=headers)) as stream:
            ranged = stream.r.status == 206
            skip = min(start, 1) if ranged else start
            while part := read_up_to(stream, skip or length):
                if skip:
                    skip -= len(part)
                    continue
                yield part
                start, length = start + len(part), min(2 * length, LARGEST_PART)
            if not ranged:
                return
            total = stream.r.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else files.info(name)["size"]
    else:
        size = files.info(name)["size"]
    while start < size:
        end = min(start + length, size)
        part = files.cat_file(name, start=start, end=end)
        if len(part) > end - start:
            part = part[start:end]  # the server ignored this range
        if not part:
            raise OSError(f"{start} of {size} bytes came")
        yield part
        start, length = start + len(part), min(2 * length, LARGEST_PART)


def read_up_to(stream: Any, size: int) -> bytes:
    """Return `size` bytes of a stream, fewer at its end."""
    pieces, left = [], size
    while left and (piece := stream.read(min(left, FIRST_PART))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def connect(url: str, timeout: float) -> tuple[Any, str]:
    """Return the file system of a URL or path, and the name there. timeout: seconds without data, for http."""
    if not url.startswith("http"):
        return fsspec.url_to_fs(url)
    import aiohttp

    # The whole transfer may take longer than the timeout. Without a cache of clients, since it would keep the first timeout.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    return fsspec.url_to_fs(url, client_kwargs={"timeout": limits}, skip_instance_cache=True)


def output_of(command: str, timeout: float) -> Iterator[bytes]:
    """Yield the output of a command. There is no shell: `sh -c '...'` is one.

    Raises OSError if it fails or prints nothing for `timeout` seconds. The message has the last line of its errors, without its
    arguments.
    """
    words = shlex.split(command)
    with tempfile.TemporaryFile() as errors:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(words, **streams, start_new_session=True)
        assert process.stdout is not None
        silent = threading.Event()

        def kill() -> None:
            silent.set()
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started

        try:
            while True:
                alarm = threading.Timer(timeout, kill)
                alarm.start()
                try:
                    part = os.read(process.stdout.fileno(), LARGEST_PART)
                finally:
                    alarm.cancel()
                if not part:
                    break
                yield part
            process.wait(timeout)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        errors.seek(max(errors.seek(0, os.SEEK_END) - 4096, 0))
        lines = errors.read().decode(errors="replace").split("\n")
    if silent.is_set():
        raise OSError(f"nothing came for {timeout:g} seconds")
    if process.returncode:
        last = next((line for line in reversed(lines) if line.strip()), "")
        for word in sorted(re.findall(r"[^\s'\"|;<>()]{4,}", command.removeprefix(words[0])), key=len, reverse=True):
            last = last.replace(word, "...")
        raise OSError(f"exit code {process.returncode}: {last}")
