"""Webdataset shards: their URLs, and one shard as a sequence of samples that are found by number.

A shard is indexed by its tar headers and read by offset, so no sample is read twice or in vain. A damaged header ends a tar
stream without an error (Python's tarfile takes it for the archive's end, webdataset with it); here the scan goes on at the next
sound one, and only the samples that it hit are lost.
"""

import contextlib
import glob
import io
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from operator import itemgetter
from shlex import quote
from typing import Any, BinaryIO

from braceexpand import braceexpand

from lcm.core.errors import UserError
from lcm.data.members import CAPTIONS, Sample, Skip, captions_of, metadata
from lcm.runtime.atomic_io import lines_of

IMAGES = ("png", "jpg", "jpeg", "webp", "img")
LATENTS = ("latent.npy", "sample.npy")  # in place of an image, see `lcm.data.latents`
SCHEMES = ("", "file", "http", "https", "s3", "gs", "hf")
MAX_BYTES = 64 * 2**20  # of a sample: no image that is trained on comes near it
FOREIGN = 2**20  # bytes of other samples that may lie between a sample's members
# What Windows, macOS, a NAS and Jupyter leave beside a user's files.
LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "system volume information"),
    *("__macosx", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd"),
    *("@eadir", ".@__thumb", ".thumbnails", ".ipynb_checkpoints"),
}
ADVICE = {
    "apart": "the files of a sample must follow each other under one name: pack them from one folder with tar --sort=name",
    "link": "links to files outside of the tar hold nothing: pack the files themselves with tar --dereference",
    "duplicate": "a name stands for several pictures or captions, and nothing tells which belong together: rename them",
}
Filter = Callable[[str | None, Mapping[str, Any]], str | None]
Member = tuple[str, str, tarfile.TarInfo]  # (key, extension, header)


def expand_urls(shards: str | Sequence[str], option: str = "data.shards", *, allow_pipe: bool = False) -> list[str]:
    """Return shard paths or URLs from globs, `{000..123}` braces and list files (`@shards.txt`, one a line).

    Local ones must exist. allow_pipe: also `pipe:<command that prints a shard>`, but never from a list file, which may be
    another's.
    """
    urls: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if pattern.startswith("@"):
            urls += expand_urls(list_file(os.path.expanduser(pattern[1:]), option), option)
            continue
        for url in map(os.path.expanduser, expand_braces(pattern, option)):
            scheme = scheme_of(url)
            if scheme == "pipe" and not allow_pipe:
                raise UserError(f"{option}: pipe: URLs run a command: only data.allow_pipe=true allows that, and no list file")
            if scheme not in (*SCHEMES, "pipe"):
                raise UserError(f"{option}: {scheme}: URLs are not read, only local paths and {', '.join(SCHEMES[2:])}")
            urls += [url] if is_remote(url) else local_files(url, option)
    if not urls:
        raise UserError(f"{option}={shards} names no shards: point it at webdataset .tar files (globs and braces work)")
    return [url for url in urls if not is_litter(url)] or urls


def expand_braces(pattern: str, option: str) -> Iterator[str]:
    """Yield what the braces stand for, `{00000}` for one shard."""
    try:
        for url in braceexpand(pattern):
            yield url if scheme_of(url) == "pipe" or os.path.exists(local(url)) else re.sub(r"\{(\d+)\}", r"\1", url)
    except ValueError:
        raise UserError(
            f"{option}: the braces of {pattern!r} do not close: write ranges as {{000..123}} and choices as {{a,b}}"
        ) from None


def local_files(url: str, option: str) -> list[str]:
    """Return the file of this name, else the files that match it as a glob. Raises UserError where there is none."""
    path = local(url)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        braces = "; ranges in braces are written {000..123}, choices {a,b}" if "{" in url else ""
        raise UserError(f"no shards match {url!r}: point {option} at webdataset .tar files (globs and braces work){braces}")
    if all(map(os.path.isdir, found)):
        raise UserError(f"{option}: {found[0]} is a folder{way_from(found[0], option)}")
    return found


def way_from(folder: str, option: str) -> str:
    """Return what to do with a folder in place of shards, by what lies in it and one level below."""
    escaped = glob.escape(folder.rstrip("/"))
    pattern = f"{escaped}/*.tar"
    if not glob.glob(pattern):
        files = [file.lower() for depth in ("*", "*/*") for file in glob.iglob(depth, root_dir=folder)]
        if any(file.endswith(".tar") for file in files):
            pattern = f"{escaped}/*/*.tar"
        elif any(file.rpartition(".")[2] in IMAGES for file in files):
            name = f"{os.path.basename(os.path.abspath(folder))}.tar"
            return (
                f" of pictures: pack it with `tar --sort=name -cf {quote(name)} -C {quote(folder)} .`, each picture with a "
                f"text file of the same name beside it, and set {option}={name}"
            )
    return f": give its shards, as in '{pattern}'"


def list_file(path: str, option: str) -> list[str]:
    try:
        return [line for line in lines_of(path) if not line.startswith("#")]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}=@{path}: the list of shards cannot be read ({reason})") from error


def scheme_of(url: str) -> str:
    head, colon, _ = url.partition(":")
    return head.lower() if colon and "/" not in head else ""


def is_remote(url: str) -> bool:
    return scheme_of(url) not in ("", "file")


def local(url: str) -> str:
    return url[len("file://") :] if url.startswith("file://") else url


def first_of(sample: Mapping[str, Any], extensions: Sequence[str]) -> str | None:
    return next((extension for extension in extensions if extension in sample), None)


def is_litter(path: str) -> bool:
    """Return whether an operating system or a tool left this file beside the user's own."""
    parts = path.lower().split("/")
    return parts[-1].startswith("._") or not LITTER.isdisjoint(parts)


def advice(dropped: Mapping[str, int]) -> str:
    """Return what to do about samples that were left out for these reasons, to be added to a sentence about them."""
    return "".join(f"; {ADVICE[reason]}" for reason in dropped if reason in ADVICE)


def headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar, also behind damaged ones."""
    with contextlib.suppress(tarfile.TarError):  # an empty file, or an archive that ends within its last member
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115 - the file is the caller's
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte a member
            yield info


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield each file and link of a tar; the key ends at the name's first dot, and hidden files have none."""
    for info in headers(file):
        folder, _, name = info.name.lstrip("/").rpartition("/")
        stem, _, extension = name.partition(".")
        if (info.isfile() or info.islnk() or info.issym()) and stem and extension and not is_litter(info.name):
            yield (f"{folder}/{stem}" if folder else stem), extension, info


def samples(
    file: BinaryIO, needs: Sequence[str], tells: Sequence[str]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], bool]]:
    """Yield `(key, {extension: header}, whether it is ambiguous)` of each sample: members of one key follow each other.

    A name may come again, from two tars that were joined: a repeated extension begins another sample. needs, tells: extensions
    of which a sample must have one each, the picture's and those that may hold a caption.
    """
    for first, run in groupby(members(file), key=itemgetter(0)):
        found: list[tuple[str, dict[str, tarfile.TarInfo], bool]] = []
        for key, parts in by_key(first, list(run), needs, tells).items():
            split: list[dict[str, tarfile.TarInfo]] = [{}]
            for extension, info in parts:
                if extension in split[-1]:
                    split.append({})
                split[-1][extension] = info
            ambiguous = len(split) > 1 and not all(is_complete(sample, needs, tells) for sample in split)
            found += [(key, sample, ambiguous) for sample in ([dict(parts)] if ambiguous else split)]
        yield from sorted(found, key=lambda sample: min(info.offset for info in sample[1].values()))


def by_key(
    first: str, run: list[Member], needs: Sequence[str], tells: Sequence[str]
) -> dict[str, list[tuple[str, tarfile.TarInfo]]]:
    """Sort members whose names are alike up to the first dot by sample.

    The first dot ends the key, as in webdataset: `0.seg.png` is a member of sample `0`. The dot before the extension does so
    where that alone gives samples: `photo.001.jpg` and `photo.001.txt` are sample `photo.001`.
    """
    if not any("." in extension for _, extension, _ in run):
        return {first: [(extension.lower(), info) for _, extension, info in run]}
    known = [f".{extension}" for extension in (*needs, *tells)]
    held: dict[str, set[str]] = {}
    for _, extension, _ in run:
        name = f".{extension}"
        for end in known:
            if name.lower().endswith(end):
                held.setdefault(name[: -len(end)], set()).add(end[1:])
    whole = held.get("", set())

    def is_own(ends: set[str]) -> bool:  # the labels of `0.seg.png` in `0.seg.json` make it no sample
        return ends & set(tells) not in (set(), {"json"}) or ends & set(tells) == whole & set(tells)

    stems = {stem for stem, ends in held.items() if not whole or (is_complete(ends, needs, tells) and is_own(ends))}
    found: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    for _, extension, info in run:
        name = f".{extension}"
        stem = name.rpartition(".")[0]
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        found.setdefault(first + stem, []).append((name[len(stem) + 1 :].lower(), info))
    return found


def is_complete(extensions: Collection[str], needs: Sequence[str], tells: Sequence[str]) -> bool:
    return any(extension in extensions for extension in needs) and any(name in extensions for name in tells)


# What is taken for a shard by mistake, by its first bytes.
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


def why_empty(path: str) -> str:
    """Return why a file has no members that could be samples."""
    with open(path, "rb") as file:
        start = file.read(512)
        if not start:
            return "it is empty"
        for magic, kind in KINDS.items():
            if start.startswith(magic):
                return kind
        file.seek(0)
        found = [info for info in islice(headers(file), 1000) if not info.isdir()]
    if any(info.issym() or info.islnk() for info in found):
        return ADVICE["link"]
    if found:
        return f"its files have no names such as 0.jpg and 0.txt, but {', '.join(info.name for info in found[:3])}"
    return "expected a .tar of <key>.jpg + <key>.txt members"


class Shard:
    """The usable samples of one local .tar file, by number; opened once, read by offset.

    needs: extensions of which a sample must have one, besides a caption; captions: see `captions_of`.
    keep: `(caption, metadata) -> reason or None`; a sample is used where it keeps every caption that may be drawn.
    dropped: how many samples were left out, by reason; `broken`: the keys of those that are damaged, not unwanted.
    extensions: of all members. repeated: samples under a name that an earlier one has; their keys get their place in the file.
    """

    def __init__(
        self,
        path: str,
        *,
        needs: Sequence[str] = IMAGES,
        captions: Mapping[str, float] | None = None,
        keep: Filter | None = None,
    ) -> None:
        self.path, self.needs, self.captions, self.keep = path, needs, captions, keep
        self.tells = (*(captions or CAPTIONS), "json")
        self.dropped: Counter[str] = Counter()
        self.broken: dict[str, str] = {}
        self.extensions: set[str] = set()
        self.starts, self.ends = array("Q"), array("Q")
        self.repeated: dict[int, str] = {}
        self.links: dict[int, tuple[int, int]] = {}  # where the content of a link lies, by the link's offset
        self.file = open(path, "rb")  # noqa: SIM115 - closed with the shard
        self.size = os.fstat(self.file.fileno()).st_size
        seen: set[str] = set()
        lacking: dict[str, dict[str, list[str]]] = {"no_image": {}, "no_caption": {}}
        for key, held, ambiguous in samples(self.file, needs, self.tells):
            dangling = {extension for extension, info in held.items() if not info.isfile() and not self._follow(info)}
            extensions = held.keys() - dangling
            self.extensions |= extensions
            start = min(info.offset for info in held.values())
            end = max(info.offset_data + info.size * info.isfile() for info in held.values())
            size = sum(info.size if info.isfile() else self.links.get(info.offset, (0, 0))[1] for info in held.values())
            flaw = "duplicate" if ambiguous else self._flaw(key, extensions, size, end)
            if flaw is None and end - start > size + FOREIGN:
                flaw = "apart"
            elif flaw in lacking and dangling:
                flaw = "link"
            elif flaw in lacking:
                lacking[flaw].setdefault(key.rpartition("/")[2], []).append(key)
            if flaw is not None:
                self.broken[key] = flaw
            if reason := flaw or self._unwanted(start, end):
                self.dropped[reason] += 1
                continue
            if key in seen:
                self.repeated[start] = f"{key}@{start}"
            seen.add(key)
            self.starts.append(start)
            self.ends.append(end)
        for name in lacking["no_image"].keys() & lacking["no_caption"].keys():
            for reason, keys in lacking.items():
                self.broken |= dict.fromkeys(keys[name], "apart")
                self.dropped[reason] -= len(keys[name])
            self.dropped["apart"] += 1
        self.dropped = +self.dropped

    def _follow(self, info: tarfile.TarInfo) -> bool:
        """Note where the content of a link lies. Returns whether it is a file of the same tar."""
        folder = os.path.dirname(info.name) if info.issym() else ""
        target = self._files.get(os.path.normpath(os.path.join(folder, info.linkname)).lstrip("/"))
        if target is None or sum(target) > self.size:
            return False
        self.links[info.offset] = target
        return True

    @cached_property
    def _files(self) -> dict[str, tuple[int, int]]:
        """`(offset, size)` of each file by name, for the few tars that hold links."""
        with open(self.path, "rb") as file:
            return {
                os.path.normpath(info.name).lstrip("/"): (info.offset_data, info.size)
                for info in headers(file)
                if info.isfile()
            }

    def _flaw(self, key: str, extensions: Collection[str], size: int, end: int) -> str | None:
        if ".." in key.split("/"):
            return "name"  # nothing is extracted here, but names are passed on to shards that others may extract
        if end > self.size:
            return "cut"
        if size > MAX_BYTES:
            return "bytes"
        if not any(extension in extensions for extension in self.needs):
            return "no_image"
        return None if any(name in extensions for name in self.tells) else "no_caption"

    def _unwanted(self, start: int, end: int) -> str | None:
        if self.keep is None:
            return None
        sample = self._read(start, end)
        try:
            meta = metadata(sample)
            verdicts = [self.keep(text, meta) for texts in captions_of(sample, self.captions).values() for text in texts]
            return next(filter(None, verdicts), None)
        except Skip as skip:
            return skip.reason

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Sample:
        """`{"__key__", "__url__", <extension>: bytes, ...}`, undecoded."""
        return self._read(self.starts[index], self.ends[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _read(self, start: int, end: int) -> Sample:
        content = os.pread(self.file.fileno(), end - start, start)
        for key, held, _ in samples(io.BytesIO(content), self.needs, self.tells):
            if all(info.offset for info in held.values()):
                continue  # another sample's, between this one's members
            sample: Sample = {"__url__": self.path, "__key__": self.repeated.get(start, key)}
            for extension, info in held.items():
                if info.isfile():
                    sample[extension] = content[info.offset_data : info.offset_data + info.size]
                elif link := self.links.get(start + info.offset):
                    sample[extension] = os.pread(self.file.fileno(), link[1], link[0])
            return sample
        return {"__url__": self.path}  # the file was changed since

    def close(self) -> None:
        self.file.close()
