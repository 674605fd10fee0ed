"""Samples of a tar: members of one name, as webdataset groups them, and links between members."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple

from lcm.data.tar import BLOCK, WINDOW, Bytes, Member, headers

FOREIGN = 2**20  # bytes of other samples that may lie between a sample's members
# Files that Windows, macOS, a NAS and Jupyter leave beside a user's own.
LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "system volume information"),
    *("__macosx", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd"),
    *("@eadir", ".@__thumb", ".thumbnails", ".ipynb_checkpoints"),
}
# Messages for files that are no tar, by the first bytes.
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


def is_litter(path: str) -> bool:
    """Return whether an operating system or a tool wrote this file."""
    parts = path.lower().split("/")
    return parts[-1].startswith("._") or not LITTER.isdisjoint(parts)


def members(file: Bytes, window: int = WINDOW) -> Iterator[Member]:
    """Yield the members that can belong to a sample. Hidden files have no key."""
    for member in headers(file, window):
        if member.extension and not member.key.endswith("/") and member.key and not is_litter(member.name):
            yield member


class TarSample(NamedTuple):
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


def samples(file: Bytes, needs: Sequence[str], text_extensions: Sequence[str], window: int = WINDOW) -> Iterator[TarSample]:
    """Yield the samples of a tar. The members of one key follow each other.

    A key may come again in a tar that was joined from two: a repeated extension begins another sample. needs, text_extensions:
    a complete sample has an extension of each: a picture and a caption.
    """
    for first, run in groupby(members(file, window), key=attrgetter("key")):
        group: list[TarSample] = []
        for key, parts in by_key(first, list(run), needs, text_extensions).items():
            split: list[dict[str, Member]] = [{}]
            for extension, member in parts:
                if extension in split[-1]:
                    split.append({})
                split[-1][extension] = member
            ambiguous = len(split) > 1 and not all(is_complete(part, needs, text_extensions) for part in split)
            group += [TarSample(key, part, ambiguous) for part in ([dict(parts)] if ambiguous else split)]
        yield from group if len(group) == 1 else sorted(group, key=attrgetter("start"))


def by_key(
    first: str, run: list[Member], needs: Sequence[str], text_extensions: Sequence[str]
) -> dict[str, list[tuple[str, Member]]]:
    """Return the (extension, member) pairs of each sample by its key. run: members with equal names up to the first dot.

    The first dot ends the key, as in webdataset: `0.seg.png` belongs to sample `0`. If that gives no complete sample, the dot
    before the extension ends the key: `photo.001.jpg` and `photo.001.txt` are sample `photo.001`.
    """
    if not any("." in member.extension for member in run):
        return {first: [(member.extension.lower(), member) for member in run]}
    ends = [f".{extension}" for extension in (*needs, *text_extensions)]
    extensions_by_stem: dict[str, set[str]] = {}
    for member in run:
        name = f".{member.extension}"
        for end in ends:
            if name.lower().endswith(end):
                extensions_by_stem.setdefault(name[: -len(end)], set()).add(end[1:])
    whole = extensions_by_stem.get("", set())

    def is_sample(extensions: set[str]) -> bool:  # `0.seg.png` with labels in `0.seg.json` is no sample
        texts = extensions & set(text_extensions)
        return texts not in (set(), {"json"}) or texts == whole & set(text_extensions)

    stems = {
        stem
        for stem, extensions in extensions_by_stem.items()
        if not whole or (is_complete(extensions, needs, text_extensions) and is_sample(extensions))
    }
    by_stem: dict[str, list[tuple[str, Member]]] = {}
    for member in run:
        name = f".{member.extension}"
        stem = name.rpartition(".")[0]
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        by_stem.setdefault(first + stem, []).append((name[len(stem) + 1 :].lower(), member))
    return by_stem


def is_complete(extensions: Collection[str], needs: Sequence[str], text_extensions: Sequence[str]) -> bool:
    return any(extension in extensions for extension in needs) and any(name in extensions for name in text_extensions)


class Links:
    """The contents of a tar's members, also of links. The whole tar is scanned when the first link is followed."""

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
