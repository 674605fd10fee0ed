"""Files that are complete or absent, writable folders, and text files of other programs."""

import codecs
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lcm.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_HANDLES = (errno.EMFILE, errno.ENFILE)  # too many files are open
# The system lacks a resource for a moment. The file may be sound.
TRANSIENT = (
    *(*NO_HANDLES, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EBUSY),
    *(errno.ESTALE, errno.ETIMEDOUT),
)


@contextmanager
def whole_file(target: Path, writer: object = "", keep: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a new file, which then takes the target's place. A kill at any moment leaves the old file or the new file.

    writer: the name of this process, if several processes may write the target at the same time. keep: the new path of the old
    file; None: it is replaced. Raises UserError if the disk is full.
    """
    partial = target.with_name(f"{target.stem}{writer}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            target.replace(keep)
        partial.replace(target)
        sync_names(target.parent)
    except Exception as error:
        if full := os_error(error, FULL):
            raise UserError(
                f"{target} cannot be written whole ({full.strerror}): make room on its disk or write elsewhere, then run the "
                "same command again"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder, which then takes the target's place. An incomplete folder never has the target's name."""
    partial = target.with_name(f"{target.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        remove(target)
        partial.rename(target)
    finally:
        remove(partial)


def locked(file: Path) -> TextIO:
    """Open a file and lock it against other processes until it is closed, if the file system has locks.

    Raises BlockingIOError if another process holds the lock. lockf's locks, unlike flock's, are not inherited by forks.
    """
    opened = file.open("a")
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            opened.close()
            raise BlockingIOError(error.errno, "another process holds the lock", str(file)) from None
    return opened


def digest(content: Any) -> str:
    """Return 16 hex digits of the SHA-256 of plain containers, for file names and keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sync_names(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def os_error(error: BaseException | None, numbers: Container[int | None]) -> OSError | None:
    """Return the OSError with one of these numbers among an error's causes, or None. numbers: values of `errno`.

    `torch.save` hides an OSError in a RuntimeError.
    """
    while error is not None and not (isinstance(error, OSError) and error.errno in numbers):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def text_of(content: bytes) -> str:
    """Return the text of another program's UTF-8 file, without byte order marks. The UnicodeError names the likely encoding."""
    if b"\0" in content or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UnicodeError("it looks like UTF-16 or UTF-32: save it as UTF-8")
    try:
        return content.decode().replace("\ufeff", "")  # joined files have marks inside, too
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise UnicodeError(f"{byte} is not UTF-8 (Latin-1, Windows-1252?): save it as UTF-8") from None


def lines_of(file: str | Path) -> list[str]:
    """Return the lines of another program's text file, stripped, without blank ones. Raises OSError or UnicodeError."""
    text = io.StringIO(text_of(Path(file).read_bytes()), newline=None)  # str.splitlines would end lines at U+0085 or U+2028
    return [line for line in map(str.strip, text) if line]


def writable(folder: Path, option: str) -> Path:
    """Make the folder that an option names, and return it. Raises UserError if it cannot be written to."""
    try:
        return try_writing(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): set {option} to a writable folder") from None


def try_writing(folder: Path) -> Path:
    """Make a folder if needed, and return it. Raises OSError if no file can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    (folder / ".writable").unlink(missing_ok=True)  # another process may have removed the file
    return folder
