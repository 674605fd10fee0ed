"""Remote shards, copied whole to a local folder: once per node, whatever its ranks and workers."""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from lcm.core.errors import UserError
from lcm.core.numbers import Count, NonNegative, Positive
from lcm.data.remote import TooLarge, bring
from lcm.runtime.atomic_io import NO_HANDLES, TRANSIENT, os_error
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)


class ShardCache:
    """A folder of at most about `max_gb` gigabytes; the shards used longest ago make room. A larger one is not brought.

    A download is tried `attempts` times with growing pauses (1, 2, 4, ... seconds times `pause`), appears in one rename, and
    files are named by the whole URL: shards of one basename do not mix.
    """

    def __init__(
        self, folder: str, *, max_gb: Positive = 50.0, attempts: Count = 5, pause: NonNegative = 1.0, timeout: Positive = 60.0
    ):
        self.folder, self.max_gb = Path(folder), max_gb
        self.attempts, self.pause, self.timeout = attempts, pause, timeout

    def fetch(self, url: str, flaw: Callable[[str], str | None] = lambda file: None) -> str:
        """Return the local path of `url`'s content.

        Raises OSError when every attempt failed; an attempt also fails where `flaw` says what is wrong with the file that came.
        Raises UserError where the folder cannot be written.
        """
        path = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 - closed below, where an error is another
        except OSError as error:
            if path.is_file():
                return str(path)  # a cache that can be read only, of shards that are there
            if error.errno in TRANSIENT:
                raise
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}): set data.cache.folder or paths.data to a writable folder"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker or rank may be at it
            try:
                os.utime(path)
            except FileNotFoundError:
                self._download(url, path, flaw)
        return str(path)

    def _download(self, url: str, path: Path, flaw: Callable[[str], str | None]) -> None:
        partial = path.with_suffix(".partial")
        for attempt in range(1, self.attempts + 1):
            try:
                bring(url, partial, self.timeout, self.max_gb * 1e9)
                if wrong := flaw(str(partial)):
                    raise OSError(wrong)
                break
            except Exception as error:  # whatever a file system's client raises for a bad connection
                partial.unlink(missing_ok=True)
                if failure := os_error(error, NO_HANDLES):
                    raise OSError(failure.errno, failure.strerror) from error
                message = f"{redacted(url)}: {type(error).__name__}: {str(error).replace(url, redacted(url))}"
                if attempt == self.attempts or isinstance(error, ImportError | TooLarge):
                    raise OSError(message) from None
                log.warning("attempt %d of %d failed, %s", attempt, self.attempts, message)
                time.sleep(self.pause * 2 ** (attempt - 1))
        self._make_room(partial.stat().st_size)
        partial.rename(path)

    def _make_room(self, size: int) -> None:
        kept: list[tuple[os.stat_result, Path]] = []
        for file in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                kept.append((file.stat(), file))
        total = size
        for stat, file in sorted(kept, key=lambda known: known[0].st_mtime, reverse=True):
            total += stat.st_size
            if total > self.max_gb * 1e9:
                file.unlink(missing_ok=True)  # who has it open reads on
