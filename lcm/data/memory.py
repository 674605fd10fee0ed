"""A cache of remote shards in /dev/shm. The processes of a node share it. The last process removes it."""

import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from lcm.core.errors import UserError
from lcm.data.cache import ShardCache
from lcm.data.fetch import size_of
from lcm.runtime.redaction import redacted

MEMORY = Path("/dev/shm")
SHARE = 0.5  # the share of /dev/shm for shards; loader workers pass batches through the rest
# The guard waits until no process holds the folder, also after kills. Then it removes the folder, unless another has its name.
GUARD = """
import fcntl, os, shutil, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(folder, fcntl.LOCK_EX)
if os.path.samestat(os.stat(sys.argv[1]), os.fstat(folder)):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
held: dict[Path, int] = {}  # handles of the folders that this process and its forks hold


class MemoryCache(ShardCache):
    """A cache in memory. A shard is removed when its lane has passed the shard after it.

    The processes of a user on a node share the cache. It takes at most half of /dev/shm. Raises UserError without /dev/shm.
    """

    def __init__(self) -> None:
        folder = MEMORY / f"lcm-{os.getuid()}"
        try:
            super().__init__(str(folder), max_gb=SHARE * shutil.disk_usage(MEMORY).total / 1e9)
            hold(folder)
        except OSError as error:
            raise UserError(
                f"data.cache=null streams remote shards through memory, but {folder} cannot be used ({error.strerror}): choose "
                "data=shards without data.cache=null, which keeps them on a disk"
            ) from None

    def release(self, url: str) -> None:
        self.path_of(url).unlink(missing_ok=True)  # processes that have it open can read on

    def check_room(self, url: str, shards: int) -> None:
        """Raise UserError if the cache is too small for `shards` shards of the size of `url`. An unknown size is no error."""
        size = size_of(url, self.timeout)
        if size is not None and size * shards > self.max_gb * 1e9:
            raise UserError(
                f"data.cache=null keeps up to {shards} shards in memory, such as {redacted(url)} of {size / 1e9:.2g} GB, and "
                f"half of {MEMORY} is {self.max_gb:.2g} GB: set a smaller data.lanes, or a disk by data.cache.folder"
            )


def hold(folder: Path) -> None:
    """Make the folder if needed, and hold it until this process ends. The folder is removed after its last holder."""
    if folder in held:
        return
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process has removed the folder
            continue
        if os.fstat(handle).st_uid != os.getuid():
            os.close(handle)
            raise PermissionError(0, "it is another user's")
        is_first = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(handle):  # files of processes that were killed together with their guard
                os.unlink(name, dir_fd=handle)
        except BlockingIOError:
            is_first = False
        fcntl.flock(handle, fcntl.LOCK_SH)
        if folder.exists() and os.path.samestat(folder.stat(), os.fstat(handle)):
            break
        os.close(handle)
    held[folder] = handle
    guard = start_guard(folder) if is_first else None
    Finalize(None, release_folder, (folder, guard), exitpriority=-1)  # after the end of the workers


def start_guard(folder: Path) -> subprocess.Popen:
    """Start the process that removes the folder. It outlives a kill of this process."""
    silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", GUARD, str(folder)], **silent, start_new_session=True)


def release_folder(folder: Path, guard: subprocess.Popen | None) -> None:
    """Release the folder, and wait for the guard to remove it."""
    if folder in held:
        os.close(held.pop(folder))
    if guard is not None:
        with suppress(subprocess.TimeoutExpired):  # other processes still hold the folder
            guard.wait(5)
