"""One remote file brought here, with no second try: through fsspec, or by the user's own command (`pipe:` URLs)."""

import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from lcm.data.shards import scheme_of


class TooLarge(OSError):
    """What comes does not end where it should."""


class Limit(Callback):
    """Ends a download of more than so many bytes."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def call(self, *args: Any, **kwargs: Any) -> None:
        check_size(max(self.size or 0, self.value), self.limit)


def check_size(size: int, limit: float) -> None:
    if size > limit:
        raise TooLarge(f"it is larger than {limit / 1e9:g} GB, all that the cache may hold (its max_gb)")


def bring(url: str, file: Path, timeout: float, limit: float = math.inf) -> None:
    """limit: of its bytes. Raises what the file system's client raises, TooLarge, or OSError for a command that fails."""
    if scheme_of(url) == "pipe":
        run(url.partition(":")[2], file, timeout, limit)
    else:
        remote, name = connect(url, timeout)
        remote.get_file(name, str(file), callback=Limit(limit))
    check_size(file.stat().st_size, limit)


def connect(url: str, timeout: float) -> tuple[Any, str]:
    """The file system of a URL or path, and the name there. timeout: seconds without any news, for http."""
    if not url.startswith("http"):
        return fsspec.url_to_fs(url)
    import aiohttp

    # Nothing heard for so long is a failure; the whole may take longer. No cache of clients: it would keep the first timeout.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    return fsspec.url_to_fs(url, client_kwargs={"timeout": limits}, skip_instance_cache=True)


def run(command: str, file: Path, timeout: float, limit: float = math.inf) -> None:
    """The command's output becomes the file. There is no shell: `sh -c '...'` is one. Raises OSError with its last line of
    errors, without its own arguments, if it fails, or if it is silent for `timeout` seconds."""
    words = shlex.split(command)
    with file.open("wb") as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)
        try:
            before, size = -1, 0
            while process.poll() is None and before < size:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout)
                before, size = size, os.fstat(output.fileno()).st_size
                check_size(size, limit)
        finally:
            silent = process.poll() is None
            if silent:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started itself
                process.wait()
        errors.seek(max(errors.seek(0, os.SEEK_END) - 4096, 0))
        lines = errors.read().decode(errors="replace").split("\n")
    if silent:
        raise OSError(f"nothing came for {timeout:g} seconds")
    if process.returncode:
        last = next((line for line in reversed(lines) if line.strip()), "")
        for part in sorted(re.findall(r"[^\s'\"|;<>()]{4,}", command.removeprefix(words[0])), key=len, reverse=True):
            last = last.replace(part, "...")
        raise OSError(f"exit code {process.returncode}: {last}")
