"""A cache of remote shards. Its files can be read during their download."""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lcm.core.errors import UserError
from lcm.core.numbers import Count, NonNegative, Positive
from lcm.data.fetch import parts
from lcm.data.growing import GrowingFile
from lcm.data.urls import scheme_of
from lcm.runtime.atomic_io import FULL, NO_HANDLES, TRANSIENT, os_error
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
AHEAD = 2**21  # bytes that a download fetches ahead of its readers; beyond them it pauses after each part
PAUSE = 1.0  # seconds


class TooLarge(OSError):
    """A file is larger than the cache."""


class Differs(OSError):
    """A downloaded file differs from its manifest."""


class Download(GrowingFile):
    """The file of a remote shard. One thread of one process of the node downloads it.

    flaw: see `ShardCache.open`.
    """

    def __init__(self, cache: "ShardCache", url: str, flaw: Callable[[str], str | None]) -> None:
        super().__init__(cache.path_of(url))
        self.cache, self.url, self.flaw = cache, url, flaw
        self.failed = self.path.with_suffix(".failed")

    def _start(self) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.failed.stat().st_mtime >= self.cache.started:  # another process of this training has failed
                raise OSError(self.failed.read_text())
        try:
            super()._start()
        except OSError as error:
            if error.errno in TRANSIENT:
                raise
            raise UserError(
                f"cannot write to {self.cache.folder} ({error.strerror}): set data.cache.folder or paths.data to a writable "
                "folder"
            ) from None

    def write(self) -> None:
        try:
            self._download()
        except Exception as error:
            with suppress(OSError):
                self.failed.write_text(str(error))
            raise

    def _download(self) -> None:
        """Write the file piece by piece. A failed piece is requested again, after a growing pause."""
        attempt, reached = 1, 0
        while True:
            try:
                with self.part.open("wb" if scheme_of(self.url) == "pipe" else "ab") as file:
                    for part in parts(self.url, file.tell(), self.cache.timeout):
                        check_size(file.tell() + len(part), self.cache.max_gb * 1e9)
                        file.write(part)
                        file.flush()
                        self.requested.pause(file.tell(), AHEAD, PAUSE)
                if flaw := self.flaw(str(self.part)):
                    self.part.unlink()
                    raise Differs(flaw)
                break
            except Exception as error:  # a file system's client raises errors of many kinds
                if failure := os_error(error, NO_HANDLES):
                    raise OSError(failure.errno, failure.strerror) from error
                if full := os_error(error, FULL):
                    raise UserError(
                        f"{self.cache.folder} cannot hold the shards that are read now ({full.strerror}): make room, or set a "
                        "smaller data.lanes"
                    ) from None
                with suppress(FileNotFoundError):
                    if (size := self.part.stat().st_size) > reached:
                        attempt, reached = 1, size  # only attempts without new bytes are counted
                message = f"{redacted(self.url)}: {type(error).__name__}: {str(error).replace(self.url, redacted(self.url))}"
                if attempt == self.cache.attempts or isinstance(error, ImportError | TooLarge):
                    self.part.unlink(missing_ok=True)
                    raise OSError(message) from None
                log.warning("attempt %d of %d failed, %s", attempt, self.cache.attempts, message)
                time.sleep(self.cache.pause * 2 ** (attempt - 1))
                attempt += 1
        self.cache.make_room(self.part.stat().st_size)
        self.part.rename(self.path)


class ShardCache:
    """A folder of at most about `max_gb` gigabytes for remote shards. The least recently used shards are removed first.

    A request is tried `attempts` times, with pauses of 1, 2, 4, ... times `pause` seconds. timeout: seconds without
    data that count as a failure. Files are named by the digest of the whole URL.
    """

    def __init__(
        self, folder: str, *, max_gb: Positive = 50.0, attempts: Count = 5, pause: NonNegative = 1.0, timeout: Positive = 60.0
    ):
        self.folder, self.max_gb = Path(folder), max_gb
        self.attempts, self.pause, self.timeout = attempts, pause, timeout
        self.started = time.time()

    def open(self, url: str, flaw: Callable[[str], str | None] = lambda file: None) -> Download:
        """Start the download of `url` and return its file. Raises OSError if it failed before, UserError for a bad folder.

        flaw: `file -> ` the difference of the file from the manifest, or None. A file that differs is fetched again.
        """
        download = Download(self, url, flaw)
        download.ensure()
        with suppress(OSError):
            os.utime(download.path)  # `make_room` removes the least recently used files
        return download

    def path_of(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"

    def release(self, url: str) -> None:
        """Do nothing: a shard that is not needed soon stays until `make_room` removes it."""

    def make_room(self, size: int) -> None:
        """Remove the least recently used shards until `size` more bytes fit."""
        files: list[tuple[os.stat_result, Path]] = []
        for file in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process made room
                files.append((file.stat(), file))
        total = size
        for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime, reverse=True):
            total += stat.st_size
            if total > self.max_gb * 1e9:
                file.unlink(missing_ok=True)  # processes that have it open can read on


def check_size(size: int, limit: float) -> None:
    if size > limit:
        raise TooLarge(f"it is larger than the {limit / 1e9:g} GB that the cache may hold (max_gb)")
