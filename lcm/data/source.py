"""A set of shards that is read in one way, and how many usable samples each of them has."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from lcm.core.errors import UserError
from lcm.data.cache import ShardCache
from lcm.data.expected import Manifests
from lcm.data.filters import Filters
from lcm.data.members import CAPTIONS, Sample, Skip, caption_of, captions_of, metadata, weights_of
from lcm.data.shards import IMAGES, LATENTS, Shard, advice, expand_urls, is_remote, local, why_empty
from lcm.runtime.atomic_io import NO_HANDLES, TRANSIENT, digest, os_error
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
TRIED = 8  # shards that may be dead before the first that is looked into
LOOKED_AT = 100  # samples of that one
SHOWN = 8  # kinds of members that a complaint lists
NAMED = 10  # left-out samples that are named per reason; all are counted
PAUSES = (0.1, 0.5, 2.0)  # seconds before a shard is opened again that the system could not open just then
COUNTING = 3  # raised when members become samples, or are counted, in another way: what an index holds is then counted again


class Facts(NamedTuple):
    """What an index knows of a shard: usable samples, how many others were left out for which reason, and what was measured of
    each usable one (a byte, see `lcm.data.buckets.aspect`), if anything was."""

    samples: int
    dropped: dict[str, int]
    aspects: bytes = b""


class Source:
    """needs: extensions of which every sample must have one. captions: see `captions_of`; also of what `filters` judge.
    measure: `sample -> byte`, noted of each when it is counted. index: the folder where counts are kept between runs.
    option: the configuration's that names the shards, for errors."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        needs: Sequence[str] = IMAGES,
        captions: Mapping[str, float] | None = None,
        filters: Filters | None = None,
        measure: Callable[[Sample], int] | None = None,
        cache: ShardCache | None = None,
        index: str | None = None,
        option: str = "data.shards",
    ) -> None:
        self.option, self.named = option, Counter[str]()
        self.urls, self.needs, self.filters, self.measure = list(urls), needs, filters, measure
        self.captions = None if captions is None else weights_of(captions)
        self.cache, self.index, self.manifests = cache, index, Manifests()
        self.counted: dict[str, Facts] = {}
        self.sound = 0

    @classmethod
    def of_option(cls, cfg: DictConfig, option: str, cache: ShardCache | None) -> "Source":
        """Return the shards that a program's option names, such as `val_shards` of sample.py."""
        captions: Any = OmegaConf.to_container(cfg.captions) if cfg.captions else None
        return cls(expand_urls(cfg[option], option), captions=captions, cache=cache, option=option)

    def part(self, url: str) -> "Source":
        """Return one shard alone, read in the same way."""
        how: dict[str, Any] = {"needs": self.needs, "captions": self.captions, "filters": self.filters}
        return Source([url], **how, cache=self.cache, index=self.index, option=self.option)

    def path(self, shard: int) -> str:
        """Where the shard lies on this machine. Raises OSError if it cannot be brought here."""
        url = self.urls[shard]
        if not is_remote(url):
            return local(url)
        if self.cache is None:
            raise OSError(f"{redacted(url)} needs a cache on this machine: choose data=shards, or +data/cache=default")
        return self.cache.fetch(url, lambda file: self.manifests[url].flaw(file))

    def open(self, shard: int, make_room: Callable[[], bool] = lambda: False, *, filtered: bool = True) -> Shard:
        """Open a shard. make_room: closes other files where too many are open, and returns whether it could.

        Raises OSError for a shard that cannot be had, UserError where the system fails whatever the shard.
        """
        pauses = iter(PAUSES)
        while True:
            try:
                return self._open(shard, filtered)
            except OSError as error:
                failure = os_error(error, TRANSIENT)
                if failure is None:
                    raise
                if failure.errno in NO_HANDLES and make_room():
                    continue
                pause = next(pauses, None)
                if pause is None:
                    way = "raise the limit, `ulimit -n 4096`" if failure.errno in NO_HANDLES else "run the same command again"
                    raise UserError(f"{redacted(self.urls[shard])} cannot be opened ({failure.strerror}): {way}") from error
                time.sleep(pause)

    def _open(self, shard: int, filtered: bool) -> Shard:
        options: dict[str, Any] = {"needs": self.needs, "captions": self.captions, "keep": self.filters if filtered else None}
        try:
            return Shard(self.path(shard), **options)
        except FileNotFoundError:
            if not is_remote(self.urls[shard]):
                raise
            return Shard(self.path(shard), **options)  # once more: another process has just made room with it

    def check(self) -> None:
        """Refuse, before any training, shards without images or captions, as one of the first few that can be read shows.

        Raises UserError.
        """
        flaws: list[str] = []
        for number, url in enumerate(map(redacted, self.urls[:TRIED])):
            try:
                with contextlib.closing(self.open(number, filtered=False)) as shard:
                    extensions, links, reason = shard.extensions, shard.dropped["link"], ""
                    captions = self._captions(shard)
                    if not extensions:
                        reason = f"{url} is not a readable webdataset shard: {why_empty(shard.path)}"
                    elif captions and all(isinstance(caption, Skip) for caption in captions):
                        reason = f"{url} has no captions that can be read ({captions[0]})"
            except OSError as error:
                reason = f"{url} cannot be opened ({error})"
            if reason:
                flaws.append(reason)
                continue
            held = f"its samples hold {', '.join(sorted(extensions)[:SHOWN])}" + ", ..." * (len(extensions) > SHOWN)
            hint = advice({"link": links}) if links else ""
            if not extensions & set(self.needs):
                if extensions & set(LATENTS):
                    raise UserError(f"{url} holds latents, not pictures: set {self.option} to shards of pictures")
                if self.needs != IMAGES and extensions & set(IMAGES):
                    raise UserError(
                        f"{url} holds pictures, not latents: encode it with python -m lcm.encode, or choose data=shards"
                    )
                raise UserError(f"{url} has no images: {held}, expected one of {', '.join(self.needs)}{hint}")
            names = (*(self.captions or CAPTIONS), "json")
            if not extensions & set(names):
                raise UserError(
                    f"{url} has no captions: {held}, expected one of {', '.join(names)}, or others by data.captions{hint}"
                )
            self.sound = number
            return
        raise UserError(flaws[0] + f", nor can the {len(flaws) - 1} shards after it be read" * (len(flaws) > 1))

    def _captions(self, shard: Shard) -> list[dict[str, list[str]] | Skip]:
        """Return what `captions_of` says of the shard's first samples, up to the first that has a caption."""
        captions: list[dict[str, list[str]] | Skip] = []
        for sample in islice(shard, LOOKED_AT):
            try:
                return [captions_of(sample, self.captions)]
            except Skip as skip:
                captions.append(skip)
        return captions

    def _first_samples(self) -> Iterator[Sample]:
        """Yield samples of the shard that `check` found sound, whether the filters keep them or not."""
        with contextlib.suppress(OSError), contextlib.closing(self.open(self.sound, filtered=False)) as shard:
            yield from islice(shard, LOOKED_AT)

    def blind_filters(self) -> list[str]:
        """Return the filters that leave out nothing, since no sample of the first ones says what they read."""
        if self.filters is None or self.filters.missing == "drop":
            return []
        described = []
        for sample in self._first_samples():
            with contextlib.suppress(Skip):
                described.append((caption_of(sample, self.captions), metadata(sample)))
        return self.filters.blind(described)

    def absent_captions(self) -> list[str]:
        """Return the names in `captions` that none of the first samples has."""
        names = set(self.captions or ())
        for sample in self._first_samples() if names else ():
            with contextlib.suppress(Skip):
                names -= captions_of(sample, self.captions).keys()
        return sorted(names)

    def facts(self) -> list[Facts]:
        """Of every shard in the order of `urls`; shards that no earlier run has counted are opened now, with progress."""
        known = {**self.counted, **self._load()}
        new = [n for n, url in enumerate(self.urls) if self.stamp(url) not in known]
        with ThreadPoolExecutor(8) as pool:
            counted = track(pool.map(self._count, new), "counting samples", total=len(new), disable=len(new) < 100)
            for number, facts in zip(new, counted, strict=True):
                stamp = self.stamp(self.urls[number])
                known[stamp] = facts
                if "shard" not in facts.dropped:  # one that could not be had is tried again next time
                    self._note(stamp, facts)
        return [known[self.stamp(url)] for url in self.urls]

    def _count(self, shard: int) -> Facts:
        url = self.urls[shard]
        samples, size, _ = self.manifests[url]
        if samples is not None and self.filters is None and self.measure is None and is_remote(url):
            return Facts(samples, {})  # a small file instead of the shard; what is broken in it shows when it is read
        try:
            opened = self.open(shard)
        except OSError as error:
            log.warning("leaving out shard %s: %s", redacted(url), error)
            return Facts(0, {"shard": 1})
        aspects = b"" if self.measure is None else bytes(map(self.measure, opened))
        opened.close()
        for key, reason in opened.broken.items():
            self._name(reason, key, redacted(url))
        if opened.repeated:
            log.warning(
                "%s holds %d samples under names that others of its samples have, such as %s: all are used",
                redacted(url), len(opened.repeated), next(iter(opened.repeated.values())).rpartition("@")[0],
            )  # fmt: skip
        found = len(opened) + opened.dropped.total()
        if samples is not None and found < samples:
            opened.dropped["missing"] = samples - found
            log.warning("%s holds %d of its %d samples: it is cut or damaged", redacted(url), found, samples)
        elif not found:
            opened.dropped["shard"] = 1
            log.warning("%s holds no samples, it is no webdataset shard: %s", redacted(url), why_empty(opened.path))
        elif size not in (None, actual := os.path.getsize(opened.path)):
            log.warning("%s has %d bytes, %d in its manifest: it is cut, damaged or another", redacted(url), actual, size)
        return Facts(len(opened), dict(opened.dropped), aspects)

    def _name(self, reason: str, key: str, url: str) -> None:
        """Log the first samples that are left out for a reason; all are counted."""
        self.named[reason] += 1
        if self.named[reason] <= NAMED:
            hint = advice({reason: 1}) if self.named[reason] == 1 else ""
            log.warning("leaving out sample %s of %s: %s%s", key, url, reason, hint)
        elif self.named[reason] == NAMED + 1:
            log.warning("leaving out more samples for the same reason, which are counted and not named: %s", reason)

    def _note(self, stamp: str, facts: Facts) -> None:
        """Keep what was counted of a shard, in the index too if that can be written: it only saves counting again."""
        self.counted[stamp] = facts
        if self.index is None:
            return
        entry = {"shard": stamp, "samples": facts.samples, "dropped": facts.dropped}
        try:
            file = self._file(self.index)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write(json.dumps({**entry, **({"aspects": facts.aspects.hex()} if self.measure else {})}) + "\n")
        except OSError as error:
            warn_of_index(self.index, error.strerror)
            self.index = None

    def _file(self, index: str) -> Path:
        how = [COUNTING, list(self.needs), self.filters.signature() if self.filters else ""]
        how += [sorted(self.captions) if self.captions else [], bool(self.measure)]
        return Path(index, f"{digest(how)}.jsonl")

    def _load(self) -> dict[str, Facts]:
        known: dict[str, Facts] = {}
        with contextlib.suppress(OSError, UnicodeError):
            for line in self._file(self.index).read_text().splitlines() if self.index else ():
                with contextlib.suppress(ValueError):  # a line that a killed run left half-written: its shard is counted again
                    entry: dict[str, Any] = json.loads(line)
                    aspects = bytes.fromhex(entry.get("aspects", ""))
                    known[entry["shard"]] = Facts(entry["samples"], entry["dropped"], aspects)
        return known

    @staticmethod
    def stamp(url: str) -> str:
        """What an index knows a shard by: a local one that was changed is another."""
        if is_remote(url):  # what a query asks for may be the shard itself; a digest keeps its secrets
            query = hashlib.sha256(url.encode()).hexdigest()[:12] if "?" in url else ""
            return f"{redacted(url)} {query}".rstrip()
        stat = os.stat(local(url))
        return f"{os.path.abspath(local(url))} {stat.st_size} {stat.st_mtime_ns}"


@cache
def warn_of_index(index: str, reason: str) -> None:
    log.warning("%s cannot be written (%s): each start counts the shards again; data.index names another", index, reason)


def total_dropped(facts: Sequence[Facts]) -> Counter[str]:
    dropped: Counter[str] = Counter()
    for shard in facts:
        dropped.update(shard.dropped)
    return dropped
