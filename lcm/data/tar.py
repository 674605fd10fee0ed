"""Samples of a tar file. The file may be damaged or still growing.

Python's tarfile treats a damaged header as the end of the archive. This scan continues at the next sound header. Only damaged
samples are lost.
"""

import os
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple, Protocol

BLOCK = 512  # bytes of a header, and the unit of a tar
WINDOW = 4096  # bytes that a scan reads at once: the headers and texts of a sample, but not its picture
MAX_BYTES = 64 * 2**20  # of a sample: no image that is trained on comes near it
LARGEST = 2**50  # bytes of a member: a header that claims more is damaged
FOREIGN = 2**20  # bytes of other samples that may lie between a sample's members
FILES, LINKS, EXTENDED = b"0\0", b"12", b"xgLK"  # type flags of headers
# Files that Windows, macOS, a NAS and Jupyter leave beside a user's own.
LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "system volume information"),
    *("__macosx", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd"),
    *("@eadir", ".@__thumb", ".thumbnails", ".ipynb_checkpoints"),
}
# Files that users take for a shard, by their first bytes.
KINDS = {
    b"\x1f\x8b": "it is compressed (gzip): gunzip it first",
    b"BZh": "it is compressed (bzip2): bunzip2 it first",
    b"\xfd7zXZ\0": "it is compressed (xz): unxz it first",
    b"\x28\xb5\x2f\xfd": "it is compressed (zstd): unzstd it first",
    b"\x04\x22\x4d\x18": "it is compressed (lz4): unlz4 it first",
    b"\x1f\x9d": "it is compressed (compress): gunzip it first",
    b"PK\3\4": "it is a zip archive: unzip it, and pack its files with tar --sort=name",
    b"7z\xbc\xaf\x27\x1c": "it is a 7z archive: unpack it, and pack its files with tar --sort=name",
    b"Rar!": "it is a rar archive: unpack it, and pack its files with tar --sort=name",
    b"PAR1": "it is a parquet table: img2dataset brings its pictures into shards",
    b"version https://git-lfs": "it is a pointer of Git LFS: git lfs pull brings the file",
    b"<": "it is a web page: the download went wrong",
    b"\xff\xd8\xff": "it is a picture: pack it and its caption with tar --sort=name",
    b"\x89PNG": "it is a picture: pack it and its caption with tar --sort=name",
    b"\0\5\x16\7": "it is what macOS notes beside a file of that name: remove it",
}
ADVICE = {
    "apart": "the files of a sample must follow each other under one name: pack them from one folder with tar --sort=name",
    "link": "links to files outside of the tar hold nothing: pack the files themselves with tar --dereference",
    "duplicate": "a name stands for several pictures or captions, and nothing tells which belong together: rename them",
}


def advice(reasons: Mapping[str, int]) -> str:
    """Return advice for samples that were left out for these reasons, as the end of a message."""
    return "".join(f"; {ADVICE[reason]}" for reason in reasons if reason in ADVICE)


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
    """A file or link in a tar. offset: of its first header; data: of its content; link: the name of a link's target."""

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
        if (info := parsed(block)) is None:
            offset, name, link, extended = offset + BLOCK, "", "", False  # a long name is of the damaged member
            continue
        own_name, size, kind, own_link = info
        data = offset + BLOCK
        if not extended:
            start = offset
        extended = kind in EXTENDED
        if extended:
            offset = data + -(-size // BLOCK) * BLOCK
            if kind != b"g" and size <= MAX_BYTES:
                long_name, long_link = extension_of(file.read(data, size), kind)
                name, link = long_name or name, long_link or link
            continue
        if kind in FILES:
            yield Member((name or own_name).lstrip("/"), start, data, size)
            offset = data + -(-size // BLOCK) * BLOCK
        else:
            if kind in LINKS:
                yield Member((name or own_name).lstrip("/"), start, data, 0, link or own_link, kind == b"2")
            offset = data
        name = link = ""


def parsed(block: bytes) -> tuple[str, int, bytes, str] | None:
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
        kind = b"5"  # a folder, as tar's first version wrote it
    link = block[157:257].partition(b"\0")[0] if kind in LINKS else b""
    return text(name), size, kind, text(link)


def text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def extension_of(content: bytes, kind: bytes) -> tuple[str, str]:
    """Return the (name, link) in an extended header, for the member after it."""
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


def is_litter(path: str) -> bool:
    """Return whether an operating system or a tool wrote this file."""
    parts = path.lower().split("/")
    return parts[-1].startswith("._") or not LITTER.isdisjoint(parts)


def members(file: Bytes, window: int = WINDOW) -> Iterator[Member]:
    """Yield the members that can belong to a sample. Hidden files have no key."""
    for member in headers(file, window):
        if member.extension and not member.key.endswith("/") and member.key and not is_litter(member.name):
            yield member


class Sample(NamedTuple):
    """A sample's members by lower-case extension. ambiguous: it has several pictures or captions that cannot be paired."""

    key: str
    members: dict[str, Member]
    ambiguous: bool

    @property
    def start(self) -> int:
        return min(member.offset for member in self.members.values())

    @property
    def end(self) -> int:
        return max(member.data + member.size for member in self.members.values())


def samples(file: Bytes, needs: Sequence[str], tells: Sequence[str], window: int = WINDOW) -> Iterator[Sample]:
    """Yield the samples of a tar. The members of one key follow each other.

    A key may come again, from two tars that were joined: a repeated extension begins another sample. needs, tells: a sample
    must have one extension of each: a picture and a possible caption.
    """
    for first, run in groupby(members(file, window), key=attrgetter("key")):
        group: list[Sample] = []
        for key, parts in by_key(first, list(run), needs, tells).items():
            split: list[dict[str, Member]] = [{}]
            for extension, member in parts:
                if extension in split[-1]:
                    split.append({})
                split[-1][extension] = member
            ambiguous = len(split) > 1 and not all(is_complete(part, needs, tells) for part in split)
            group += [Sample(key, part, ambiguous) for part in ([dict(parts)] if ambiguous else split)]
        yield from group if len(group) == 1 else sorted(group, key=attrgetter("start"))


def by_key(first: str, run: list[Member], needs: Sequence[str], tells: Sequence[str]) -> dict[str, list[tuple[str, Member]]]:
    """Group members with equal names up to the first dot by sample.

    The first dot ends the key, as in webdataset: `0.seg.png` belongs to sample `0`. If that gives no complete sample, the dot
    before the extension ends the key: `photo.001.jpg` and `photo.001.txt` are sample `photo.001`.
    """
    if not any("." in member.extension for member in run):
        return {first: [(member.extension.lower(), member) for member in run]}
    ends = [f".{extension}" for extension in (*needs, *tells)]
    held: dict[str, set[str]] = {}
    for member in run:
        name = f".{member.extension}"
        for end in ends:
            if name.lower().endswith(end):
                held.setdefault(name[: -len(end)], set()).add(end[1:])
    whole = held.get("", set())

    def is_sample(extensions: set[str]) -> bool:  # the labels of `0.seg.png` in `0.seg.json` make it no sample
        return extensions & set(tells) not in (set(), {"json"}) or extensions & set(tells) == whole & set(tells)

    stems = {
        stem
        for stem, extensions in held.items()
        if not whole or (is_complete(extensions, needs, tells) and is_sample(extensions))
    }
    by_stem: dict[str, list[tuple[str, Member]]] = {}
    for member in run:
        name = f".{member.extension}"
        stem = name.rpartition(".")[0]
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        by_stem.setdefault(first + stem, []).append((name[len(stem) + 1 :].lower(), member))
    return by_stem


def is_complete(extensions: Collection[str], needs: Sequence[str], tells: Sequence[str]) -> bool:
    return any(extension in extensions for extension in needs) and any(name in extensions for name in tells)


class Links:
    """The contents of a tar's members, links among them. The whole tar is scanned when the first link is followed."""

    def __init__(self, file: Bytes) -> None:
        self.file = file

    def content(self, member: Member, limit: int | None = None) -> bytes | None:
        """Return the content of a file or of a link's target, up to `limit` bytes. None: the target is not in the tar."""
        target = member if member.link is None else self.target(member)
        if target is None:
            return None
        return self.file.read(target.data, target.size if limit is None else min(target.size, limit))

    def target(self, link: Member) -> Member | None:
        """Return a link's target in the same tar, if it is complete."""
        folder = os.path.dirname(link.name) if link.symbolic else ""
        target = self.files.get(os.path.normpath(os.path.join(folder, link.link or "")).lstrip("/"))
        return None if target is None or target.data + target.size > self.file.size() else target

    @cached_property
    def files(self) -> dict[str, Member]:
        self.file.size()  # waits until the tar has arrived
        return {os.path.normpath(member.name): member for member in headers(self.file) if member.link is None}


def why_empty(file: Bytes) -> str:
    """Return the reason why a file has no samples."""
    start = file.read(0, BLOCK)
    if not start:
        return "it is empty"
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            return kind
    first = list(islice(headers(file), 1000))
    if any(member.link is not None for member in first):
        return ADVICE["link"]
    if first:
        return f"its files have no names such as 0.jpg and 0.txt, but {', '.join(member.name for member in first[:3])}"
    return "expected a .tar of <key>.jpg + <key>.txt members"
