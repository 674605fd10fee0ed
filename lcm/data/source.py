"""The shards of one source: local or remote tars with pictures or latents."""

import contextlib
import copy
import hashlib
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from omegaconf import DictConfig, OmegaConf

from lcm.core.errors import UserError
from lcm.data.cache import Download, ShardCache
from lcm.data.checks import extensions_of, first_samples, shard_flaw
from lcm.data.filters import Filters
from lcm.data.index import VERSION, Notes, Rules, ShardIndex, index_folder
from lcm.data.manifest import Manifests
from lcm.data.memory import MemoryCache
from lcm.data.sample_fields import Sample, Skip, caption_of, captions_of, metadata, skipping, weights_of
from lcm.data.samples import Links, advice, samples, why_empty
from lcm.data.tar import LocalFile, Memory
from lcm.data.urls import IMAGES, expand_urls, is_remote, local
from lcm.runtime.atomic_io import NO_HANDLES, TRANSIENT, digest, os_error
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
TRIED = 8  # shards that a check tries to read, until one is readable
HELD = 3  # shards of a lane in memory: the previous, the current and the next
OPEN_SHARDS = 256  # the most open shards of a source in a process
PAUSES = (0.1, 0.5, 2.0)  # seconds before the next attempts to open a shard, after a temporary error of the system


class Source:
    """A list of shards. A shard is opened and counted only when it is needed.

    urls: paths or URLs of tars. needs: every sample must have one of these extensions. captions: see `captions_of`; the filters
    judge these captions. aspect: `picture's first bytes -> code`, stored for each sample. cache: the cache of remote shards;
    None keeps the shards in memory. index: the folder of the shards' indexes; None uses a temporary folder. option: the
    configuration key of the shards, for messages.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        needs: Sequence[str] = IMAGES,
        captions: Mapping[str, float] | None = None,
        filters: Filters | None = None,
        aspect: Callable[[bytes], int] | None = None,
        cache: ShardCache | None = None,
        index: str | None = None,
        option: str = "data.shards",
    ) -> None:
        self.urls, self.option, self.filters = list(urls), option, filters
        self.cache = MemoryCache() if cache is None and self.any_remote else cache
        judge = filters if filters is not None and filters.limits else None
        self.rules = Rules(needs, None if captions is None else weights_of(captions), judge, aspect)
        self.folder, self.manifests = index_folder(index), Manifests()
        self.indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self.files: OrderedDict[int, tuple[LocalFile | Download, Links]] = OrderedDict()
        self.empty: set[int] = set()  # unreadable shards
        # A quarter of the process' handles: training and validation have a source each, and the program opens other files.
        handles = os.sysconf("SC_OPEN_MAX")
        self.limit = max(1, min(OPEN_SHARDS, handles // 4)) if handles > 0 else OPEN_SHARDS

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a spawned worker (macOS), which opens its own files."""
        return {**vars(self), "indexes": OrderedDict(), "files": OrderedDict()}

    @classmethod
    def from_option(cls, cfg: DictConfig, option: str, cache: ShardCache | None) -> "Source":
        """Return the shards of a program's option, such as `val_shards` of sample.py."""
        captions: Any = OmegaConf.to_container(cfg.captions) if cfg.captions else None
        return cls(expand_urls(cfg[option], option), captions=captions, cache=cache, option=option)

    def subset(self, shards: Sequence[int]) -> Self:
        """Return a source of these shards with the same settings."""
        part = copy.copy(self)
        part.urls = [self.urls[shard] for shard in shards]
        part.indexes, part.files, part.empty = OrderedDict(), OrderedDict(), set()
        return part

    @property
    def captions(self) -> Mapping[str, float] | None:
        return self.rules.captions

    @cached_property
    def rules_identity(self) -> list[Any]:
        """Return the rules as plain values, for the key of an index."""
        rules = [VERSION, list(self.rules.needs), self.filters.signature() if self.rules.judge and self.filters else ""]
        return [*rules, sorted(self.captions) if self.captions else [], self.rules.aspect is not None]

    def stamps(self) -> list[str]:
        """Return the identity of each shard, see `stamp`."""
        return [stamp(url) for url in self.urls]

    def key(self, shard: int) -> str:
        """Return the key of a shard's index."""
        return digest([stamp(self.urls[shard]), self.rules_identity])

    def name(self, shard: int) -> str:
        """Return the shard's file name, without secrets."""
        return Path(redacted(self.urls[shard])).name

    def title(self, shard: int) -> str:
        """Return the shard's URL for messages, without secrets."""
        return redacted(self.urls[shard])

    # Called by an order

    def usable(self, shard: int, count: int) -> tuple[int, bool]:
        """Wait until `count` usable samples of the shard are known. Return the known number, and whether all are known.

        An unreadable shard counts as empty. Raises UserError for a failure of the system.
        """
        if shard in self.empty:
            return 0, True
        try:
            return self.retried(shard, lambda: self._index(shard).wait(count))
        except OSError as error:
            log.warning("leaving out shard %s: %s", self.title(shard), error)
            self.empty.add(shard)
            return 0, True

    def aspect(self, shard: int, sample: int) -> int:
        return int(self.retried(shard, lambda: self._index(shard)[sample])["aspect"])

    def weight(self, shard: int) -> float:
        """Return the bytes of a shard, or 1 if some shards are remote and their sizes unknown."""
        if self.any_remote:
            return 1.0
        with contextlib.suppress(OSError):
            return float(max(os.path.getsize(local(self.urls[shard])), 1))
        return 1.0

    @cached_property
    def any_remote(self) -> bool:
        return any(map(is_remote, self.urls))

    def prefetch(self, shard: int) -> None:
        """Start to fetch and scan a shard that will be needed soon."""
        with contextlib.suppress(OSError):
            if is_remote(self.urls[shard]):
                self._open(shard).close()
            self._index(shard).ensure()

    def release(self, shard: int) -> None:
        """Close a shard that is not needed soon, and release it in the cache."""
        self._close(shard)
        if shard in self.indexes:
            self.indexes.pop(shard).close()
        if self.cache is not None and is_remote(self.urls[shard]):
            self.cache.release(self.urls[shard])

    def nothing_usable(self) -> UserError:
        left_out = self.left_out()
        return UserError(
            f"{len(self.urls)} shards hold no usable sample: left out are {dict(left_out)}; change {self.option} or "
            f"data.filters{advice(left_out)}"
        )

    def notes(self, shard: int) -> Notes:
        """Return a shard's counts of usable and left-out samples. Waits for the whole shard."""
        if self.usable(shard, 2**62) == (0, True) and shard in self.empty:
            return Notes(0, {"shard": 1})
        return self._index(shard).notes()

    # Reading

    def read(self, shard: int, number: int) -> Sample:
        """Return `{"__key__", "__url__", <extension>: bytes, ...}` of a usable sample. Raises Skip if it cannot be read."""
        if shard in self.empty:
            raise Skip("shard", self.title(shard))
        try:
            return self._read(shard, number)
        except OSError:  # a file server may lose a handle: open the shard once more
            self._close(shard)
            with skipping("shard", OSError):
                return self._read(shard, number)

    def _read(self, shard: int, number: int) -> Sample:
        try:
            record = self.retried(shard, lambda: self._index(shard)[number])
        except IndexError:
            raise self._changed(shard, number) from None
        start, size = int(record["start"]), int(record["size"])
        file, links = self.retried(shard, lambda: self._file(shard))
        content = file.read(start, size)
        needs, text_extensions = self.rules.needs, self.rules.text_extensions
        for key, members, _ in samples(Memory(content), needs, text_extensions, window=len(content)):
            if all(member.offset for member in members.values()):
                continue  # a member of another sample lies between the members of this sample
            sample: Sample = {"__url__": str(file.path), "__key__": f"{key}@{start}" if record["repeated"] else key}
            for extension, member in members.items():
                if member.link is None:
                    sample[extension] = content[member.data : member.data + member.size]
                elif (linked := links.content(member)) is not None:
                    sample[extension] = linked
            return sample
        raise self._changed(shard, number)

    def _changed(self, shard: int, number: int) -> Skip:
        return Skip("missing", f"sample {number} of {self.title(shard)}, which was changed since it was indexed")

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self.indexes:
            while len(self.indexes) >= self.limit:
                self.indexes.popitem(last=False)[1].close()
            options: dict[str, Any] = {"rules": self.rules, "expected": partial(self.manifests.__getitem__, self.urls[shard])}
            opener = partial(self._open, shard)
            self.indexes[shard] = ShardIndex(self.folder, self.key(shard), self.title(shard), opener, **options)
        self.indexes.move_to_end(shard)
        return self.indexes[shard]

    def _file(self, shard: int) -> tuple[LocalFile | Download, Links]:
        if shard not in self.files:
            while len(self.files) >= self.limit:
                self._close_oldest()
            file = self._open(shard)
            self.files[shard] = file, Links(file)
        self.files.move_to_end(shard)
        return self.files[shard]

    def local_path(self, shard: int) -> str:
        """Return the local path of a shard after its download. Raises OSError for an unreadable shard."""
        with contextlib.closing(self._open(shard)) as file:
            file.size()
            return str(file.path)

    def _open(self, shard: int) -> LocalFile | Download:
        """Open a shard, a remote one through the cache. Raises OSError for an unreadable shard."""
        url = self.urls[shard]
        if not is_remote(url):
            return LocalFile(local(url))
        assert self.cache is not None
        return self.cache.open(url, lambda file: self.manifests[url].flaw(file))

    def _close(self, shard: int) -> None:
        if shard in self.files:
            self.files.pop(shard)[0].close()

    def _close_oldest(self) -> bool:
        """Close the least recently used shard and index. Return whether any was open."""
        was_open = bool(self.indexes or self.files)
        if self.indexes:
            self.indexes.popitem(last=False)[1].close()
        if self.files:
            self.files.popitem(last=False)[1][0].close()
        return was_open

    def retried(self, shard: int, work: Callable[[], Any]) -> Any:
        """Return `work()`, which is repeated after a temporary error of the system, such as too many open files.

        Raises OSError for an unreadable shard, UserError for a lasting failure of the system.
        """
        pauses = iter(PAUSES)
        while True:
            try:
                return work()
            except OSError as error:
                failure = os_error(error, TRANSIENT)
                if failure is None:
                    raise
                self.indexes.pop(shard, None)
                if failure.errno in NO_HANDLES and self._close_oldest():
                    continue
                pause = next(pauses, None)
                if pause is None:
                    way = "raise the limit, `ulimit -n 4096`" if failure.errno in NO_HANDLES else "run the same command again"
                    raise UserError(f"{self.title(shard)} cannot be opened ({failure.strerror}): {way}") from error
                time.sleep(pause)

    # Checks before a training

    def check_room(self, lanes: int) -> None:
        """Raise UserError if the shards of `lanes` lanes do not fit into the memory cache, by the size of one shard."""
        remote = [url for url in self.urls if is_remote(url)]
        if isinstance(self.cache, MemoryCache) and remote:
            self.cache.check_room(remote[0], min(HELD * lanes, len(remote)))

    def check(self) -> None:
        """Raise UserError for shards without images or captions.

        Reads only the first samples of the first readable shard.
        """
        flaws: list[str] = []
        for shard in range(min(TRIED, len(self.urls))):
            title = self.title(shard)
            try:
                with contextlib.closing(self.retried(shard, partial(self._open, shard))) as file:
                    first = first_samples(file, self.rules)
                    if not extensions_of(first):
                        flaws.append(f"{title} is not a readable webdataset shard: {why_empty(file)}")
                        continue
            except OSError as error:
                flaws.append(f"{title} cannot be opened ({error})")
                continue
            self.first_samples = first
            if flaw := shard_flaw(title, first, self.rules, self.option):
                flaws.append(flaw)
                continue
            return
        raise UserError(flaws[0] + f", nor can the {len(flaws) - 1} shards after it be read" * (len(flaws) > 1))

    def unused_filters(self) -> list[str]:
        """Return the filters without effect: no filter here has its field in one of the first samples."""
        if self.filters is None or self.filters.missing == "drop":
            return []
        described = []
        for sample in self.first_samples:
            with contextlib.suppress(Skip):
                described.append((caption_of(sample, self.captions), metadata(sample)))
        return self.filters.unused(described)

    def absent_captions(self) -> list[str]:
        """Return the names in `captions` that are in none of the first samples."""
        names = set(self.captions or ())
        for sample in self.first_samples if names else ():
            with contextlib.suppress(Skip):
                names -= captions_of(sample, self.captions).keys()
        return sorted(names)

    def gone(self) -> list[str]:
        """Return local shards that are in a manifest but do not exist."""
        return self.manifests.gone(self.urls)

    def left_out(self) -> Counter[str]:
        """Return the counts of left-out samples of all shards, by reason. Waits for all shards."""
        total: Counter[str] = Counter()
        for shard in range(len(self.urls)):
            total.update(self.notes(shard).left_out)
        return total

    def close(self) -> None:
        while self._close_oldest():
            pass


def stamp(url: str) -> str:
    """Return the identity of a shard: its name, and for a local file its size and time."""
    if is_remote(url):  # a query may name the shard; its digest keeps its secrets
        query = hashlib.sha256(url.encode()).hexdigest()[:12] if "?" in url else ""
        return f"{redacted(url)} {query}".rstrip()
    try:
        status = os.stat(local(url))
    except OSError:
        return os.path.abspath(local(url))
    return f"{os.path.abspath(local(url))} {status.st_size} {status.st_mtime_ns}"
