"""Whether a checkpoint, a file or a folder, is as it was written."""

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
MARK = b"crc32 of the rest: "
COMMENT = len(MARK) + 8
BLOCK = 1 << 20
OTHER = "its checksum does not match"
LISTING = "files.json"  # in a folder that is a checkpoint: the size and CRC-32 of every other file


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


class Checked:
    """What `torch.load` needs of a file, and the CRC-32 of what it reads.

    It reads the parts in their order. The headers between them are read beside it, and at the end what it left out.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.done, self.sum = file, size, 0, 0  # of the `size` bytes `done` are summed

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        start, data = self.file.tell(), self.file.read(size)
        self.add(start, data)
        return data

    def readinto(self, buffer: Any) -> int:
        start, size = self.file.tell(), self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.add(start, memoryview(buffer)[:size])
        return size

    def add(self, start: int, data: Any) -> None:
        end = min(start + len(data), self.size)
        if start - BLOCK <= self.done < end:
            self.add_until(start)
            self.sum = zlib.crc32(data[self.done - start : end - start], self.sum)
            self.done = end

    def add_until(self, end: int) -> None:
        """Leaves the file where it was."""
        before = self.file.tell()
        self.file.seek(self.done)
        while block := self.file.read(max(0, min(BLOCK, end - self.done))):
            self.sum, self.done = zlib.crc32(block, self.sum), self.done + len(block)
        self.file.seek(before)


kept: dict[Path, dict[str, Any]] = {}  # the checkpoint that `keep` read, until it is taken


def keep(path: Path) -> str | None:
    """Read a checkpoint once, verify it and keep it; what is wrong with it, or None. A folder is verified alone."""
    if not path.is_file() or (digits := sealed(path)) is None:
        reason = damage(path)
        if path.is_file() and reason is None:
            kept[path] = torch.load(path, map_location="cpu", weights_only=True)
        return reason
    with path.open("rb") as file:
        checked = Checked(file, path.stat().st_size - COMMENT - 2)
        try:
            kept[path] = torch.load(checked, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except Exception:  # whatever it stumbles over; also code in a whole file, which is refused
            if reason := damage(path):
                return reason
            raise
        checked.add_until(checked.size)
    if closed(checked.sum) == digits:
        return None
    del kept[path]
    return OTHER


def sealed(path: Path) -> bytes | None:
    """Return the checksum that `Summed.seal` wrote; None if another program wrote the file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - COMMENT))
        mark, _, digits = file.read().partition(MARK)
    return digits if not mark and len(digits) == 8 else None


def closed(found: int) -> bytes:
    """Return the checksum of what was summed, and of the length of a comment that the zip did not have yet."""
    return b"%08x" % zlib.crc32(b"\0\0", found)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its own checksum; None if it is whole.

    One that another program wrote has only its zip's checksums, one for each tensor.
    """
    if path.is_dir():
        return folder_damage(path)
    if not path.is_file():
        return "it is not a file"
    digits = sealed(path)
    with path.open("rb") as file:
        if digits is None:
            return zip_damage(file)
        checked = Checked(file, path.stat().st_size - COMMENT - 2)
        checked.add_until(checked.size)
    return None if closed(checked.sum) == digits else OTHER


def folder_damage(folder: Path) -> str | None:
    try:
        listing = json.loads((folder / LISTING).read_text())
    except (OSError, ValueError):
        return f"it has no readable {LISTING}"
    bad = [name for name, facts in listing.items() if not (folder / name).is_file() or size_and_crc(folder / name) != facts]
    return f"its {bad[0]} is missing or not as written" if bad else None


def size_and_crc(file: Path) -> list[int]:
    """Its size and CRC-32, as a listing has them."""
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            found = zlib.crc32(block, found)
    return [file.stat().st_size, found]


def zip_damage(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception:  # whatever it stumbles over: a damaged header can say anything
        return "it is cut short or no checkpoint"
    return f"its part {bad} has another checksum than written" if bad else None
