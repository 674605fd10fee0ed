"""The index of a shard: the offsets of its usable samples. One process writes it, all processes of a node read it.

An index grows while its shard is scanned, so the first samples are usable at once. `<key>.part` is the growing file,
`<key>.index` the complete file. `<key>.json` counts the left-out samples by reason. The key is a digest of the shard's name,
size and time and of the rules, so a changed shard or changed rules get a new index.
"""

import contextlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcm.core.errors import UserError
from lcm.data.growing import GrowingFile
from lcm.data.left_out import add_left_out, left_out_log
from lcm.data.manifest import Expected
from lcm.data.sample_fields import CAPTIONS, Skip, captions_of, metadata
from lcm.data.samples import FOREIGN, Links, TarSample, samples, why_empty
from lcm.data.tar import MAX_BYTES, Bytes
from lcm.runtime.atomic_io import FULL, os_error, try_writing, whole_file

log = logging.getLogger(__name__)
RECORD = np.dtype([("start", "<u8"), ("size", "<u4"), ("aspect", "u1"), ("repeated", "u1")])
VERSION = 1  # raised when a code change alters the samples or records of a scan
FLUSH = 64  # records that are written at once
AHEAD = 64 * RECORD.itemsize  # bytes that a scan may be ahead of its readers; beyond them it pauses after each `FLUSH`
PAUSE = 2.0  # seconds
Judge = Callable[[str | None, Mapping[str, Any]], str | None]


class Rules(NamedTuple):
    """The rules that choose the samples of a shard.

    needs: a sample must have one of these extensions. captions: see `captions_of`. judge: `(caption, metadata) -> reason or
    None`, called for every caption that may be drawn. aspect: `picture's first bytes -> code`, see `lcm.data.buckets.aspect`.
    """

    needs: Sequence[str]
    captions: Mapping[str, float] | None = None
    judge: Judge | None = None
    aspect: Callable[[bytes], int] | None = None

    @property
    def text_extensions(self) -> tuple[str, ...]:
        """Return the extensions that may hold a caption."""
        return (*(self.captions or CAPTIONS), "json")


class Verdict(NamedTuple):
    """The result of a scan for one sample.

    flaw: the reason to leave the sample out; None: it is usable. damaged: the reason is damage, not a filter. aspect: the code
    of the picture's aspect ratio.
    """

    sample: TarSample
    flaw: str | None
    damaged: bool
    aspect: int = 0


def scan(file: Bytes, rules: Rules) -> Iterator[Verdict]:
    """Yield a verdict on each sample of a tar, in order. Only texts and metadata are read, not pictures."""
    links = Links(file)
    for sample in samples(file, rules.needs, rules.text_extensions):
        dangling = {extension for extension, member in sample.members.items() if member.link and not links.target(member)}
        extensions = sample.members.keys() - dangling
        flaw = "duplicate" if sample.ambiguous else sample_flaw(sample, extensions, rules, file)
        if flaw in ("no_image", "no_caption") and dangling:
            flaw = "link"
        if flaw is not None:
            yield Verdict(sample, flaw, True)
            continue
        reason, damaged = filter_verdict(sample, rules, links)
        aspect = 0
        if reason is None and rules.aspect is not None:
            picture = next(sample.members[extension] for extension in rules.needs if extension in extensions)
            aspect = rules.aspect(links.content(picture, 2**16) or b"")
        yield Verdict(sample, reason, damaged, aspect)


def sample_flaw(sample: TarSample, extensions: Collection[str], rules: Rules, file: Bytes) -> str | None:
    """Return the reason if a sample is damaged, else None."""
    if ".." in sample.key.split("/"):
        return "name"  # nothing is extracted here, but names are written to latent shards that others may extract
    if sample.end and not file.read(sample.end - 1, 1):
        return "cut"
    size = sum(member.size for member in sample.members.values())
    if size > MAX_BYTES:
        return "bytes"
    if not any(extension in extensions for extension in rules.needs):
        return "no_image"
    if not any(name in extensions for name in rules.text_extensions):
        return "no_caption"
    return "apart" if sample.end - sample.start > size + FOREIGN else None


def filter_verdict(sample: TarSample, rules: Rules, links: Links) -> tuple[str | None, bool]:
    """Return the filters' reason to leave a sample out, or None, and whether its texts are damaged."""
    if rules.judge is None:
        return None, False
    names = set(rules.text_extensions)
    texts: dict[str, Any] = {
        extension: links.content(member) or b"" for extension, member in sample.members.items() if extension in names
    }
    try:
        meta = metadata(texts)
        verdicts = (rules.judge(text, meta) for values in captions_of(texts, rules.captions, meta).values() for text in values)
        return next(filter(None, verdicts), None), False
    except Skip as skip:
        return skip.reason, True


class Notes(NamedTuple):
    """The counts of a shard.

    samples: usable samples. left_out: other samples, by reason. repeated: usable samples with the key of an earlier sample.
    """

    samples: int
    left_out: dict[str, int]
    repeated: int = 0


class ShardIndex(GrowingFile):
    """The index of one shard: a sequence of records `(start, size, aspect, repeated)`, one for each usable sample.

    folder, key: name the file. title: the shard's name for messages. opener: opens the shard. expected: returns its entry in
    the manifest.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        title: str,
        opener: Callable[[], Any],
        *,
        rules: Rules,
        expected: Callable[[], Expected] = Expected,
    ) -> None:
        super().__init__(folder / f"{key}.index")
        self.notes_file = self.path.with_suffix(".json")
        self.title, self.opener, self.rules, self.expected = title, opener, rules, expected
        self.records: np.ndarray | None = None  # the memory-mapped index, once it is complete

    def wait(self, count: int) -> tuple[int, bool]:
        """Wait for `count` records or the whole index. Return the number of records, and whether the index is complete.

        Raises OSError for an unreadable shard, UserError for a failure of the system.
        """
        if not self.whole:
            self._look()  # the index may have become complete since
        self.wait_for(count * RECORD.itemsize)
        return self.known, self.whole

    @property
    def known(self) -> int:
        """Return the number of records that can be read."""
        return self.arrived // RECORD.itemsize

    def _look(self) -> None:
        super()._look()
        if self.whole and self.file is not None:
            self.records = np.memmap(self.file, RECORD, "r") if self.arrived else np.zeros(0, RECORD)
            self.file.close()
            self.file = None

    def __getitem__(self, number: int) -> Any:
        """Return record `number`. Raises IndexError if the shard has fewer usable samples, and the errors of `wait`."""
        if number >= self.known and number >= self.wait(number + 1)[0]:
            raise IndexError(number)
        if self.records is not None:
            return self.records[number]
        return np.frombuffer(self.read(number * RECORD.itemsize, RECORD.itemsize), RECORD)[0]

    def notes(self) -> Notes:
        """Wait for the whole index, and return the shard's counts."""
        self.wait(2**62)
        return Notes(**json.loads(self.notes_file.read_bytes()))

    def write(self) -> None:
        try:
            self._scan()
        except Exception as error:
            if full := os_error(error, FULL):
                raise UserError(
                    f"{self.path.parent} cannot hold the shards' indexes ({full.strerror}): make room, or set data.index"
                ) from error
            raise

    def _scan(self) -> None:
        self.part.unlink(missing_ok=True)
        left_out, seen, repeated, pending, count = Counter[str](), set[str](), 0, [], 0
        lacking: dict[str, dict[str, list[str]]] = {"no_image": {}, "no_caption": {}}
        with contextlib.closing(self.opener()) as shard, open(self.part, "wb") as part:
            for verdict in scan(shard, self.rules):
                sample, flaw = verdict.sample, verdict.flaw
                if flaw is not None:
                    left_out[flaw] += 1
                    if flaw in lacking:
                        lacking[flaw].setdefault(sample.key.rpartition("/")[2], []).append(sample.key)
                    elif verdict.damaged:
                        left_out_log.add(flaw, sample.key, self.title)
                    continue
                is_repeated = sample.key in seen
                repeated += is_repeated
                seen.add(sample.key)
                pending.append((sample.start, sample.end - sample.start, verdict.aspect, is_repeated))
                count += 1
                if len(pending) >= FLUSH or count < FLUSH:
                    part.write(np.array(pending, RECORD).tobytes())
                    part.flush()
                    pending = []
                    self.requested.pause(count * RECORD.itemsize, AHEAD, PAUSE)  # leave the CPU to shards with waiting readers
            part.write(np.array(pending, RECORD).tobytes())
            for name in lacking["no_image"].keys() & lacking["no_caption"].keys():  # an image and its caption lie far apart
                for reason in lacking:
                    left_out[reason] -= len(lacking[reason].pop(name))
                left_out["apart"] += 1
                left_out_log.add("apart", name, self.title)
            for reason, keys in lacking.items():
                for names in keys.values():
                    for key in names:
                        left_out_log.add(reason, key, self.title)
            left_out = +left_out
            scanned, (expected_samples, size, _) = count + left_out.total(), self.expected()
            if expected_samples is not None and scanned < expected_samples:
                left_out["missing"] = expected_samples - scanned
                log.warning("%s holds %d of its %d samples: it is cut or damaged", self.title, scanned, expected_samples)
            elif not scanned:
                left_out["shard"] = 1
                log.warning("%s holds no samples, it is not a webdataset shard: %s", self.title, why_empty(shard))
            elif size not in (None, actual := shard.size()):
                log.warning("%s has %d bytes, %d in its manifest: it is cut, damaged or another file", self.title, actual, size)
        if repeated:
            log.warning("%s holds %d samples with the names of other samples: all are used", self.title, repeated)
        add_left_out(left_out)
        with whole_file(self.notes_file) as file:
            file.write(json.dumps({"samples": count, "left_out": left_out, "repeated": repeated}).encode())
        self.part.rename(self.path)

    def close(self) -> None:
        super().close()
        self.records = None


@cache
def index_folder(index: str | None) -> Path:
    """Return the folder `index` if it is writable, else a temporary folder that is removed with this process."""
    if index is not None:
        try:
            return try_writing(Path(index))
        except OSError as error:
            log.warning(
                "%s cannot be written (%s), so each start scans the shards again: set data.index to a writable folder",
                index,
                error.strerror,
            )
    temporary = tempfile.TemporaryDirectory(prefix="lcm-index-")
    temporary_folders.append(temporary)
    return Path(temporary.name)


temporary_folders: list[tempfile.TemporaryDirectory] = []
