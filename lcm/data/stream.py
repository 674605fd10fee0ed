"""Batches of decoded samples in the order of `lcm.data.order`, shared out over ranks and workers.

Batch b is positions `[start + b G, start + (b + 1) G)` of the order, G = batch_size x world_size; workers take turns over
batches and read nothing but their own. So neither workers nor, at one G, ranks change what a step trains on.
"""

import itertools
import logging
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lcm.core.errors import UserError
from lcm.data.members import Sample, Skip, skipping
from lcm.data.order import Place, Places
from lcm.data.shards import Shard, is_remote
from lcm.data.source import Source
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
PATIENCE = 256  # samples in a row that may fail to decode
OPEN_SHARDS = 256  # at most, per reader: file handles, and 16 bytes a sample
NAMED = 10  # skipped samples a worker names per reason; all are counted


def rng_of(seed: int | str, position: int) -> random.Random:
    """Return all chance of the sample at a position of the order."""
    return random.Random(f"{seed}/{position}")


class Reader:
    """Samples by place. Shards stay open, the least recently used ones close; one that cannot be had is asked for once."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.shards: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        self.dead: set[tuple[int, int]] = set()
        self.fetching: dict[tuple[int, int], Any] = {}
        self.pool = ThreadPoolExecutor(2)
        # A quarter of the process' handles: a training and a validation read, and the rest of the program has files, too.
        handles = os.sysconf("SC_OPEN_MAX")
        self.limit = max(1, min(OPEN_SHARDS, handles // 4)) if handles > 0 else OPEN_SHARDS

    def read(self, place: Place) -> Sample:
        """Raises Skip for what is not there."""
        key = place.source, place.shard
        try:
            sample = self._sample(key, place.sample)
        except OSError:  # a file server has lost the handle: once more with another
            self.shards.pop(key).close()
            with skipping("shard", OSError):
                sample = self._sample(key, place.sample)
        return sample if place.shape is None else {**sample, "__shape__": place.shape}

    def _sample(self, key: tuple[int, int], number: int) -> Sample:
        if key not in self.shards:
            while len(self.shards) >= self.limit:
                self._close_oldest()
            self.shards[key] = self._open(key)
        self.shards.move_to_end(key)
        if number >= len(self.shards[key]):
            raise Skip("missing", f"sample {number} of {self.shards[key].path}, which held more when it was counted")
        return self.shards[key][number]

    def _open(self, key: tuple[int, int]) -> Shard:
        source, shard = self.sources[key[0]], key[1]
        if key in self.dead:
            raise Skip("shard", redacted(source.urls[shard]))
        try:
            return source.open(shard, self._close_oldest)
        except OSError as error:
            self.dead.add(key)
            log.warning("skipping shard %s: %s", redacted(source.urls[shard]), error)
            raise Skip("shard", redacted(source.urls[shard])) from error

    def _close_oldest(self) -> bool:
        """Close the shard that was used longest ago. Returns whether any was open."""
        if not self.shards:
            return False
        self.shards.popitem(last=False)[1].close()
        return True

    def prefetch(self, place: Place) -> None:
        """Start to bring a remote shard here that will be needed soon."""
        key = place.source, place.shard
        if key not in self.fetching and is_remote(self.sources[key[0]].urls[key[1]]):
            if len(self.fetching) > OPEN_SHARDS:
                self.fetching.clear()
            self.fetching[key] = self.pool.submit(self.sources[key[0]].path, key[1])


class ShardStream(IterableDataset):
    """Batches of one rank: endless, or up to position `stop` and then with a partial last batch, there and at `cuts`.

    decode: `(sample, rng) -> dict`, rng seeded by (seed, position); raises Skip on a damaged sample. collate: `list -> dict`.
    Each batch also holds "position": where the order goes on after it, and "skipped": `{reason: samples}` of this rank's share.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Places,
        *,
        decode: Callable[[Sample, random.Random], Sample],
        collate: Callable[[list[Sample]], Sample],
        batch_size: int,
        seed: int | str = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int | None = None,
        cuts: Sequence[int] = (),
        ahead: int = 4096,
    ) -> None:
        self.sources, self.order, self.decode, self.collate = sources, order, decode, collate
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.start, self.stop, self.ahead = start, stop, ahead
        ends, size = [] if stop is None else sorted({*cuts, stop}), batch_size * world_size
        self.batches = [
            range(i, min(i + size, end)) for first, end in pairwise([start, *ends]) for i in range(first, end, size)
        ]
        self.remote = any(is_remote(url) for source in sources for url in source.urls)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        self.reader, self.named = Reader(self.sources), Counter[str]()
        for batch in itertools.count(number, workers):
            positions = self._positions(batch)
            if not positions:
                return
            skipped: Counter[str] = Counter()
            if samples := self._sound(batch, skipped):
                yield {**self.collate(samples), "position": positions.stop, "skipped": dict(skipped)}

    def _positions(self, batch: int) -> range:
        if self.stop is not None:
            return self.batches[batch] if batch < len(self.batches) else range(0)
        size = self.batch_size * self.world_size
        return range(self.start + batch * size, self.start + (batch + 1) * size)

    def _share(self, batch: int) -> list[tuple[int, Place]]:
        """This rank's part of a global batch: neighbours by lane, so that ranks keep to their shards. Of a last, smaller batch
        every rank gets at least a sample, the same twice if need be: a rank without one would leave the others waiting."""
        positions = self._positions(batch)
        if self.stop is None:
            members = sorted(((position, self.order[position]) for position in positions), key=lambda member: member[1][:2])
            return members[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        own = positions[self.rank :: self.world_size] or positions[self.rank % len(positions) :][:1]
        return [(position, self.order[position]) for position in own]

    def _sound(self, batch: int, skipped: Counter[str]) -> list[Sample]:
        """This rank's samples of the batch. In training sound ones, of a later batch if need be, take the place of the damaged:
        a batch keeps its size, and what it holds is a function of its position alone."""
        own = self._share(batch)
        good = self._decoded(own, skipped)
        if self.stop is not None:
            return good or self._stand_in(batch, own[0][1].shape)
        if self.remote:
            for _, place in self._share(batch + 1 + self.ahead // (self.batch_size * self.world_size)):
                self.reader.prefetch(place)
        failed: Counter[str] = Counter()
        while not good:
            batch += 1  # maybe one of another bucket, but of this one's shape: ranks shall have the same
            later = [(position, place._replace(shape=own[0][1].shape)) for position, place in self._share(batch)]
            good = self._decoded(later, failed)
            if failed.total() - failed["shard"] > PATIENCE or len(self.reader.dead) == sum(len(s.urls) for s in self.sources):
                raise UserError(f"none of {failed.total()} samples in a row could be decoded, see the warnings above")
        return [good[i % len(good)] for i in range(len(own))]

    def _stand_in(self, batch: int, shape: tuple[int, int] | None) -> list[Sample]:
        """Where several ranks make a pass and one has nothing sound of a batch, the next sound sample of any rank: with a batch
        less than the others it would leave them waiting."""
        if self.world_size == 1:
            return []
        for position in itertools.chain(*self.batches[batch:], *self.batches[:batch]):
            if good := self._decoded([(position, self.order[position]._replace(shape=shape))], Counter()):
                return good
        raise UserError("no sample of this data could be decoded, see the warnings above")

    def _decoded(self, members: list[tuple[int, Place]], skipped: Counter[str]) -> list[Sample]:
        """The samples that decode; the others are counted by reason, and the first of each are named."""
        good: list[Sample] = []
        for position, place in members:
            sample: Sample = {}
            try:
                sample = self.reader.read(place)
                good.append(self.decode(sample, rng_of(self.seed, position)))
            except Skip as skip:
                skipped[skip.reason] += 1
                self.named[skip.reason] += 1
                if self.named[skip.reason] <= NAMED:
                    log.warning("skipping %s of %s: %s", sample.get("__key__", "a sample"), sample.get("__url__", "?"), skip)
        return good
