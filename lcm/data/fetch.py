"""Downloads in parts: by fsspec, or by the user's own command (`pipe:` URLs)."""

import contextlib
import gc
import os
import re
import selectors
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import fsspec

from lcm.data.urls import scheme_of

# Without gc.freeze, a forked process would close its parent's HTTP clients and wait a second for each of them.
os.register_at_fork(after_in_child=gc.freeze)
FIRST_PART, LARGEST_PART = 2**18, 2**22  # bytes of a request: the first samples arrive soon, later ones at full rate


def parts(url: str, start: int, timeout: float) -> Iterator[bytes]:
    """Yield the content of a URL from byte `start` on, in growing parts. Raises the errors of the file system's client."""
    if scheme_of(url) == "pipe":
        yield from output_of(url.partition(":")[2], timeout)
        return
    files, name = connect(url, timeout)
    length = FIRST_PART
    if url.startswith("http"):
        # The byte before `start` is requested, too: a server refuses a range behind the end. It may also ignore the range.
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


def size_of(url: str, timeout: float) -> int | None:
    """Return the size of a URL's content in bytes. None: the size is unknown until the content is read."""
    if scheme_of(url) == "pipe":
        return None
    try:
        files, name = connect(url, timeout)
        return files.info(name)["size"]
    except Exception:  # a file system's client raises errors of many kinds
        return None


def read_up_to(stream: Any, size: int) -> bytes:
    """Return `size` bytes of a stream, fewer at its end."""
    pieces, left = [], size
    while left and (piece := stream.read(min(left, FIRST_PART))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def connect(url: str, timeout: float) -> tuple[Any, str]:
    """Return the fsspec file system of a URL or path, and the path in it. timeout: seconds without data, for http."""
    if not url.startswith("http"):
        return fsspec.url_to_fs(url)
    import aiohttp

    # total=None: a whole transfer may take longer. skip_instance_cache: a cached client would keep the first timeout.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    return fsspec.url_to_fs(url, client_kwargs={"timeout": limits}, skip_instance_cache=True)


def output_of(command: str, timeout: float) -> Iterator[bytes]:
    """Yield the output of a command, which runs without a shell (use `sh -c '...'`).

    Raises OSError if the command fails or prints nothing for `timeout` seconds. The message has the last line of stderr,
    without the command's arguments.
    """
    words = shlex.split(command)
    with tempfile.TemporaryFile() as errors:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(words, **streams, start_new_session=True)
        assert process.stdout is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while selector.select(timeout):
                    if not (part := os.read(process.stdout.fileno(), LARGEST_PART)):
                        break
                    yield part
                else:
                    raise OSError(f"nothing came for {timeout:g} seconds")
            process.wait(timeout)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the command and the processes that it started
                process.wait()
            process.stdout.close()
        errors.seek(max(errors.seek(0, os.SEEK_END) - 4096, 0))
        lines = errors.read().decode(errors="replace").split("\n")
    if process.returncode:
        last = next((line for line in reversed(lines) if line.strip()), "")
        for word in sorted(re.findall(r"[^\s'\"|;<>()]{4,}", command.removeprefix(words[0])), key=len, reverse=True):
            last = last.replace(word, "...")
        raise OSError(f"exit code {process.returncode}: {last}")
