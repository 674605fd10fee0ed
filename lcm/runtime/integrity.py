"""Checks that a checkpoint, a file or a folder, is undamaged."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
LISTING = "files.json"  # in a checkpoint folder: the size and CRC-32 of every other file
verified: set[Path] = set()  # checkpoints that this process wrote, or that rank 0 verified


def damage(path: Path) -> str | None:
    """Return the reason if a checkpoint is damaged, else None.

    A file is a zip in which torch stores a CRC-32 of every tensor. `torch.load` does not compare them.
    """
    if path.is_dir():
        return folder_damage(path)
    if not path.is_file():
        return "it is not a file"
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception:  # a damaged header can raise anything
        return "it is cut short or no checkpoint"
    if part:
        return "its checksum does not match"
    try:
        contents(path)
    except (RuntimeError, UnicodeError):  # damage outside the tensors, in the zip's directory
        return "it is cut short or no checkpoint"
    return None


def contents(file: Path) -> Any:
    """Return a checkpoint without reading its tensors, which stay on the disk."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def folder_damage(folder: Path) -> str | None:
    """Return the reason if a checkpoint folder is damaged, else None."""
    try:
        listing = json.loads((folder / LISTING).read_text())
    except (OSError, ValueError):
        return f"it has no readable {LISTING}"
    for name, size_and_sum in listing.items():
        if not (folder / name).is_file() or size_and_crc(folder / name) != size_and_sum:
            return f"its {name} is missing or not as written"
    return None


def size_and_crc(file: Path) -> list[int]:
    """Return a file's size and CRC-32."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return [file.stat().st_size, crc]
