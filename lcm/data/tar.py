"""Members of a tar file. The file may be damaged or still growing.

Python's tarfile treats a damaged header as the end of the archive. This scan continues at the next sound header. Only damaged
members are lost.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512  # bytes of a header, and the unit of a tar
WINDOW = 4096  # bytes that a scan reads at once: the headers and texts of a sample, but not its picture
MAX_BYTES = 64 * 2**20  # the most bytes of a sample
LARGEST = 2**50  # the most bytes of a member: a header that claims more is damaged
FILES, LINKS, EXTENDED = b"0\0", b"12", b"xgLK"  # type flags of headers


class Bytes(Protocol):
    """A file that may still grow."""

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on, fewer only at the end of the file. Waits for bytes of a growing file."""

    def size(self) -> int:
        """Return the size of the whole file in bytes. Waits for a growing file."""


class LocalFile:
    """A file that is whole."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._size = os.fstat(self.file.fileno()).st_size

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, start)

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        self.file.close()


class Memory:
    """Bytes of one sample."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, start: int, size: int) -> bytes:
        return self.content[start : start + size]

    def size(self) -> int:
        return len(self.content)


class Member(NamedTuple):
    """A file or link in a tar.

    offset: the offset of its first header. data: the offset of its content. link: the name of a link's target.
    """

    name: str
    offset: int
    data: int
    size: int
    link: str | None = None
    symbolic: bool = False

    @property
    def key(self) -> str:
        """Return the name up to its first dot, as webdataset does."""
        folder, _, name = self.name.rpartition("/")
        stem = name.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]


def headers(file: Bytes, window: int = WINDOW) -> Iterator[Member]:
    """Yield the files and links of a tar, also after damaged headers. window: bytes per read."""
    offset, start, name, link, extended = 0, 0, "", "", False
    buffer, buffered = b"", 0
    while True:
        if not buffered <= offset <= buffered + len(buffer) - BLOCK:
            buffer, buffered = file.read(offset, window), offset
        block = buffer[offset - buffered : offset - buffered + BLOCK]
        if len(block) < BLOCK:
            return
        if (info := parse_header(block)) is None:
            offset, name, link, extended = offset + BLOCK, "", "", False  # a long name belongs to the damaged member
            continue
        short_name, size, kind, short_link = info
        data = offset + BLOCK
        if not extended:
            start = offset
        extended = kind in EXTENDED
        if extended:
            offset = data + -(-size // BLOCK) * BLOCK
            if kind != b"g" and size <= MAX_BYTES:
                long_name, long_link = parse_extended_header(file.read(data, size), kind)
                name, link = long_name or name, long_link or link
            continue
        if kind in FILES:
            yield Member((name or short_name).lstrip("/"), start, data, size)
            offset = data + -(-size // BLOCK) * BLOCK
        else:
            if kind in LINKS:
                yield Member((name or short_name).lstrip("/"), start, data, 0, link or short_link, kind == b"2")
            offset = data
        name = link = ""


def parse_header(block: bytes) -> tuple[str, int, bytes, str] | None:
    """Return (name, size, type flag, link) of a header; None for a damaged or empty one."""
    try:
        total = int(block[148:156].strip(b" \0") or b"-1", 8)
        if sum(block) - sum(block[148:156]) + 256 != total:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # signed sums of old programs
            return (info.name, info.size, info.type, info.linkname) if 0 <= info.size <= LARGEST else None
        digits = block[124:136]
        size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b" \0") or b"0", 8)
    except (ValueError, tarfile.TarError):
        return None
    if not 0 <= size <= LARGEST:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    kind = block[156:157]
    if name.endswith(b"/") and kind == b"\0":
        kind = b"5"  # the first version of tar marks a folder like this
    link = block[157:257].partition(b"\0")[0] if kind in LINKS else b""
    return text(name), size, kind, text(link)


def text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def parse_extended_header(content: bytes, kind: bytes) -> tuple[str, str]:
    """Return the (name, link) in an extended header, which belong to the next member."""
    if kind == b"L":
        return text(content.rstrip(b"\0")), ""
    if kind == b"K":
        return "", text(content.rstrip(b"\0"))
    fields, position = {}, 0
    while position < len(content):
        length = content[position : position + 20].partition(b" ")[0]
        if not length.isdigit() or not int(length):
            break
        record = content[position : position + int(length)]
        key, _, value = record.partition(b" ")[2].rstrip(b"\n").partition(b"=")
        fields[key], position = text(value), position + int(length)
    return fields.get(b"path", ""), fields.get(b"linkpath", "")
