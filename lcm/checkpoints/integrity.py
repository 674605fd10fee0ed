"""Whether a checkpoint, a file or a folder, is as it was written."""

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
MARK = b"crc32 of the rest: "
COMMENT = len(MARK) + 8
BLOCK = 1 << 20
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
