"""Webdataset shards as a stream of batches whose order is a pure function of (seed, epoch).

Every worker of every rank walks the same global order of samples and decodes only its own share of each global batch, so the
order depends neither on the number of workers nor, for one global batch size, on the number of ranks. A `Cursor` is a
position in that order: starting from it repeats exactly what an uninterrupted stream would have given next.
"""

import glob
import logging
import random
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import fsspec
import webdataset as wds
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from lcm.errors import UserError

log = logging.getLogger(__name__)
IMAGE_KEYS = ("png", "jpg", "jpeg", "webp")
PATIENCE = 256  # samples in a row that may fail to decode
Sample = dict[str, Any]


class Cursor(NamedTuple):
    """The next sample of the global order: `epoch` and the `position` within it."""

    epoch: int = 0
    position: int = 0


def expand_urls(shards: str | list[str], option: str = "data.shards") -> list[str]:
    """Shard paths or URLs from globs and `{000..123}` braces, sorted; local ones must exist."""
    urls: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for url in braceexpand(pattern):
            found = [url] if "://" in url else sorted(glob.glob(url))
            urls += found
            if not found:
                raise UserError(f"no shards match {url!r}: point {option} at webdataset .tar files (globs and braces work)")
    return urls


def image_key(sample: Sample) -> str | None:
    return next((key for key in IMAGE_KEYS if key in sample), None)


def open_shards(urls: list[str]) -> Iterator[Sample]:
    """webdataset's samples of each shard, opened by fsspec: webdataset's own opener would run `pipe:` URLs in a shell."""
    for url in urls:
        try:
            with fsspec.open(url, "rb") as stream:
                files = wds.tariterators.tar_file_expander([{"url": url, "stream": stream}], handler=wds.reraise_exception)
                yield from wds.tariterators.group_by_keys(files, handler=wds.reraise_exception)
        except (OSError, ValueError, ImportError, tarfile.TarError) as error:
            log.warning("skipping the rest of shard %s: %s", url, error)


def read_samples(urls: list[str]) -> Iterator[Sample]:
    """Undecoded samples `{"__key__", "__url__", <extension>: bytes}` in the order of `urls` that have image and caption."""
    return (sample for sample in open_shards(urls) if image_key(sample) and ("txt" in sample or "json" in sample))


def check_shards(urls: list[str]) -> None:
    """Refuse, before any training, shards whose first sample lacks an image or a caption."""
    first = next(open_shards(urls[:1]), None)
    if first is None:
        raise UserError(f"{urls[0]} is not a readable webdataset shard: expected a .tar of <key>.jpg + <key>.txt members")
    members = sorted(key for key in first if not key.startswith("__"))
    if image_key(first) is None:
        raise UserError(f"{urls[0]} has no images: its samples hold {members}, expected one of {list(IMAGE_KEYS)}")
    if "txt" not in first and "json" not in first:
        raise UserError(f"{urls[0]} has no captions: its samples hold {members}, expected a .txt or .json member")


class ShardStream(IterableDataset):
    """Batches of decoded samples for one rank, endless if `shuffle`, else one pass over the shards in order.

    decode: `(sample, rng) -> dict` where rng is seeded by (seed, epoch, position); it raises on a damaged sample.
    collate: `list[dict] -> dict`. Each batch also holds "cursor": where the global order goes on after it.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        decode: Callable[[Sample, random.Random], Sample],
        collate: Callable[[list[Sample]], Sample],
        batch_size: int,
        seed: int = 0,
        shuffle: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: Cursor = Cursor(),  # noqa: B008
    ) -> None:
        self.urls, self.decode, self.collate = urls, decode, collate
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size, self.start = rank, world_size, start

    def epoch(self, epoch: int) -> Iterator[Sample]:
        """The global order of one epoch, undecoded: shards permuted, then a shuffle buffer of `shuffle` samples."""
        if not self.shuffle:
            return read_samples(self.urls)
        rng = random.Random(f"{self.seed}/{epoch}")
        return wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(read_samples(rng.sample(self.urls, len(self.urls))))

    def positions(self) -> Iterator[tuple[Cursor, Sample]]:
        cursor = self.start
        while True:
            samples = islice(self.epoch(cursor.epoch), cursor.position, None)
            for position, sample in enumerate(samples, cursor.position):
                yield Cursor(cursor.epoch, position), sample
                cursor = Cursor(cursor.epoch, position + 1)
            if not self.shuffle:
                return
            if cursor.position == 0:
                raise UserError(
                    f"{len(self.urls)} shards hold no usable sample: each needs an image and a .txt or .json caption"
                )
            cursor = Cursor(cursor.epoch + 1, 0)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream, ahead = self.positions(), deque[list[tuple[Cursor, Sample]]]()
        for index in range(2**62):
            members = self._ahead(stream, ahead, 0)
            if not members:
                return
            if index % workers == number and (samples := self._sound(stream, ahead)):
                last = members[-1][0]
                yield {**self.collate(samples), "cursor": Cursor(last.epoch, last.position + 1)}
            ahead.popleft()

    def _ahead(self, stream: Iterator[Any], ahead: deque[Any], batches: int) -> list[tuple[Cursor, Sample]]:
        """The global batch that comes so many batches after the current one, which stays to be read."""
        while len(ahead) <= batches:
            ahead.append(list(islice(stream, self.batch_size * self.world_size)))
        return ahead[batches]

    def _sound(self, stream: Iterator[Any], ahead: deque[Any]) -> list[Sample]:
        """This rank's samples of the current batch. In training sound ones, of a later batch if need be, take the place of
        the damaged: a batch keeps its size, and what it holds is a function of its position alone."""
        own = self._share(self._ahead(stream, ahead, 0))
        good = self._decoded(own)
        if not self.shuffle:
            return good
        batches = 0
        while not good:
            batches += 1
            if batches * len(own) > PATIENCE:
                raise UserError(f"none of {batches * len(own)} samples in a row could be decoded, see the warnings above")
            good = self._decoded(self._share(self._ahead(stream, ahead, batches)))
        return [good[i % len(good)] for i in range(len(own))]

    def _share(self, members: list[tuple[Cursor, Sample]]) -> list[tuple[Cursor, Sample]]:
        """This rank's part of a global batch. Of a validation set's last, smaller one every rank gets at least a sample, the
        same twice if need be: a rank without a batch would leave the others waiting for it."""
        if len(members) == self.batch_size * self.world_size:
            return members[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return members[self.rank :: self.world_size] or [members[self.rank % len(members)]]

    def _decoded(self, members: list[tuple[Cursor, Sample]]) -> list[Sample]:
        """The samples that decode; the others are reported."""
        good: list[Sample] = []
        for cursor, sample in members:
            try:
                good.append(self.decode(sample, random.Random(f"{self.seed}/{cursor.epoch}/{cursor.position}")))
            except Exception as error:  # whatever a broken file makes a decoder raise
                log.warning("skipping %s of %s: %s", sample["__key__"], sample["__url__"], error)
        return good
