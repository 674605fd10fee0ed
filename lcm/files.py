"""Files that are whole or absent."""

import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lcm.errors import UserError

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARK = b"crc32 of the rest: "
COMMENT = len(MARK) + 8
BLOCK = 1 << 20
LISTING = "files.json"  # in a folder that is a checkpoint: the size and CRC-32 of every other file


@contextmanager
def whole_file(target: Path, writer: object = "", keep: Path | None = None) -> Iterator[BinaryIO]:
    """Writes beside the target, syncs, renames: a kill at any moment leaves what was there before.

    writer: names this process where several may write one target at a time. keep: the name that what was there before gets.
    Raises UserError where the disk is full.
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
        if full := disk_full(error):
            raise UserError(
                f"{target} cannot be written whole ({full.strerror}): make room on its disk or write elsewhere, then run the "
                "same command again"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def sync_names(folder: Path) -> None:
    """So that the names in it, too, survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


def disk_full(error: BaseException | None) -> OSError | None:
    """The full disk among an error's causes: `torch.save` raises RuntimeError from it."""
    while error is not None and not (isinstance(error, OSError) and error.errno in FULL):
        error = error.__cause__ or error.__context__
    return error


class Summed:
    """What `torch.save` needs of a file, and the CRC-32 of what went through, so that nothing is read back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, 0

    def write(self, data: bytes) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        """Put the sum into the zip's comment: one file, one rename, and every reader of zips still reads it."""
        self.file.seek(-2, os.SEEK_END)  # the comment's length, 0 so far, ends a zip
        self.file.write(COMMENT.to_bytes(2, "little") + MARK + b"%08x" % self.sum)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its own checksum; None if it is whole.

    One that another program wrote has only its zip's checksums, one for each tensor.
    """
    if path.is_dir():
        return folder_damage(path)
    if not path.is_file():
        return "it is not a file"
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - COMMENT))
        mark, _, digits = file.read().partition(MARK)
        file.seek(0)
        if mark or len(digits) != 8:
            return zip_damage(file)
        found, left = 0, size - COMMENT - 2
        while block := file.read(min(BLOCK, left)):
            found, left = zlib.crc32(block, found), left - len(block)
    return None if b"%08x" % zlib.crc32(b"\0\0", found) == digits else "its checksum does not match"


def folder_damage(folder: Path) -> str | None:
    try:
        listing = json.loads((folder / LISTING).read_text())
    except (OSError, ValueError):
        return f"it has no readable {LISTING}"
    bad = [name for name, facts in listing.items() if not (folder / name).is_file() or sealed(folder / name) != facts]
    return f"its {bad[0]} is missing or not as written" if bad else None


def sealed(file: Path) -> list[int]:
    """Its size and CRC-32, as a listing has them."""
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            found = zlib.crc32(block, found)
    return [file.stat().st_size, found]


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def zip_damage(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception:  # whatever it stumbles over: a damaged header can say anything
        return "it is cut short or no checkpoint"
    return f"its part {bad} has another checksum than written" if bad else None
