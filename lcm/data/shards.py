"""Webdataset shards: their URLs, and one shard as a sequence of samples that are found by number.

A shard is indexed by its tar headers and read by offset, so no sample is read twice or in vain. A damaged header ends a tar
stream without an error (Python's tarfile takes it for the archive's end, webdataset with it); here the scan goes on at the next
sound one, and only the samples that it hit are lost.
"""

import contextlib
import glob
import io
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from braceexpand import braceexpand

from lcm.data.members import CAPTIONS, Sample, Skip, captions_of, metadata
from lcm.errors import UserError
from lcm.files import lines_of

IMAGES = ("png", "jpg", "jpeg", "webp", "img")
SCHEMES = ("", "file", "http", "https", "s3", "gs", "hf")
MAX_BYTES = 64 * 2**20  # of a sample: no image that is trained on comes near it
Filter = Callable[[str | None, Mapping[str, Any]], str | None]


def expand_urls(shards: str | Sequence[str], option: str = "data.shards", *, allow_pipe: bool = False) -> list[str]:
    """Shard paths or URLs from globs, `{000..123}` braces and list files (`@shards.txt`, one a line); local ones must exist.

    allow_pipe: also `pipe:<command that prints a shard>`, but never from a list file, which may be another's.
    """
    urls: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if pattern.startswith("@"):
            urls += expand_urls(list_file(pattern[1:], option), option)
            continue
        for url in braceexpand(pattern):
            scheme = scheme_of(url)
            if scheme == "pipe" and not allow_pipe:
                raise UserError(f"{option}: pipe: URLs run a command: only data.allow_pipe=true allows that, and no list file")
            if scheme not in (*SCHEMES, "pipe"):
                raise UserError(f"{option}: {scheme}: URLs are not read, only local paths and {', '.join(SCHEMES[2:])}")
            found = [url] if is_remote(url) else sorted(glob.glob(local(url)))
            urls += found
            if not found:
                raise UserError(f"no shards match {url!r}: point {option} at webdataset .tar files (globs and braces work)")
    if not urls:
        raise UserError(f"{option}={shards} names no shards: point it at webdataset .tar files (globs and braces work)")
    if not is_remote(urls[0]) and os.path.isdir(local(urls[0])):
        raise UserError(f"{option}: {urls[0]} is a folder: give its shards, as in '{urls[0]}/*.tar'")
    return urls


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


def members(file: BinaryIO) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """`(key, extension, header)` of each file in a tar, also behind damaged headers; the key ends at the name's first dot."""
    with contextlib.suppress(tarfile.TarError):  # an empty file, or an archive that ends within its last member
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)  # noqa: SIM115 - the file is the caller's
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte a member
            folder, _, name = info.name.lstrip("/").rpartition("/")
            stem, _, extension = name.partition(".")
            if info.isfile() and extension:
                yield (f"{folder}/{stem}" if folder else stem), extension.lower(), info


class Shard:
    """The usable samples of one local .tar file, by number; opened once, read by offset.

    needs: extensions of which a sample must have one, besides a caption; captions: see `captions_of`.
    keep: `(caption, metadata) -> reason or None`; a sample is used where it keeps every caption that may be drawn.
    dropped: how many samples were left out, by reason; `broken`: the keys of those that are damaged, not unwanted.
    extensions: of all members.
    """

    def __init__(
        self,
        path: str,
        *,
        needs: Sequence[str] = IMAGES,
        captions: Mapping[str, float] | None = None,
        keep: Filter | None = None,
    ) -> None:
        self.path, self.captions, self.keep = path, captions, keep
        self.dropped: Counter[str] = Counter()
        self.broken: dict[str, str] = {}
        self.extensions: set[str] = set()
        self.starts, self.ends = array("Q"), array("Q")
        self.file = open(path, "rb")  # noqa: SIM115 - closed with the shard
        size = os.fstat(self.file.fileno()).st_size
        for key, extensions, start, end in self._grouped():
            self.extensions |= extensions
            flaw = self._flaw(key, extensions, needs, captions or CAPTIONS, end - start, end > size)
            if flaw is not None:
                self.broken[key] = flaw
            if reason := flaw or self._unwanted(start, end):
                self.dropped[reason] += 1
            else:
                self.starts.append(start)
                self.ends.append(end)

    def _grouped(self) -> Iterator[tuple[str, set[str], int, int]]:
        """`(key, extensions, first byte, end)` of each sample: members of one key follow each other."""
        key, extensions, start, end = None, set[str](), 0, 0
        for name, extension, info in members(self.file):
            if name != key:
                if key is not None:
                    yield key, extensions, start, end
                key, extensions, start = name, set(), info.offset
            extensions.add(extension)
            end = info.offset_data + info.size
        if key is not None:
            yield key, extensions, start, end

    @staticmethod
    def _flaw(
        key: str, extensions: set[str], needs: Sequence[str], captions: Iterable[str], size: int, cut: bool
    ) -> str | None:
        if ".." in key.split("/"):
            return "name"  # nothing is extracted here, but names are passed on to shards that others may extract
        if cut:
            return "cut"
        if size > MAX_BYTES:
            return "bytes"
        if not extensions & set(needs):
            return "no_image"
        return None if extensions & {*captions, "json"} else "no_caption"

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
        sample: Sample = {"__url__": self.path}
        for key, extension, info in members(io.BytesIO(content)):
            sample["__key__"] = key
            sample[extension] = content[info.offset_data : info.offset_data + info.size]
        return sample

    def close(self) -> None:
        self.file.close()
