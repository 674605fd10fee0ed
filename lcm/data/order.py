"""The endless order of a training: it maps a position to a sample, as a function of shard names, seed and position.

The shards of a source are dealt to lanes by the seed. A lane walks its shards one after another, in a new order each epoch, and
shuffles samples within blocks of a shard. Positions take turns over the lanes. A shard's samples are counted when a lane
reaches it, so nothing is counted before the first batch.
"""

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from lcm.core.errors import UserError
from lcm.data.buckets import Shape, nearest

MIX = 1000  # turns in which parts get their shares by weight
FEW = 16  # shards of a lane up to which the sizes of shards matter
SMALL = 50  # a shard that is this many times smaller than the mean does not get a lane
NEARLY = 1.02  # weights whose ratio is smaller count as equal
WHOLE = 2**62  # more samples than a shard holds
FIRST_BLOCK = 64  # samples of a shard's first block; each next one is twice as large, up to `shuffle`
WINDOW = 32  # global batches that are sorted by aspect ratio together


class SampleRef(NamedTuple):
    """A sample: the numbers of its source, its lane, its shard in the source, and its own number in the shard.

    shape: (height, width) of the decoded picture in a bucket; None without buckets.
    """

    source: int
    lane: int
    shard: int
    sample: int
    shape: Shape | None = None


class Samples(Protocol):
    """The interface of a source for an order."""

    urls: list[str]

    def usable(self, shard: int, count: int) -> tuple[int, bool]:
        """Wait until `count` usable samples of the shard are known. Return the known number, and whether all are known."""

    def aspect(self, shard: int, sample: int) -> int: ...

    def weight(self, shard: int) -> float:
        """Return the shard's size if it is known without reading, else 1."""

    def prefetch(self, shard: int) -> None: ...

    def release(self, shard: int) -> None:
        """Note that the shard is not needed soon."""

    def nothing_usable(self) -> UserError:
        """Return the error for a source without usable samples."""


class Lane:
    """The endless samples of some shards of a source, one shard after another. `lane[k]` is the lane's sample number k.

    Every sample comes once per epoch. shuffle: the number of samples in a block. spare: all shards of the source, which replace
    the lane's shards if these are empty.
    """

    def __init__(
        self,
        samples: Samples,
        shards: Sequence[int],
        *,
        spare: Sequence[int],
        source: int,
        number: int,
        seed: int | str,
        shuffle: int,
    ) -> None:
        self.samples, self.shards, self.source, self.number = samples, shards, source, number
        self.seed, self.shuffle, self.spare = seed, shuffle, spare
        self.counts: dict[int, int] = {}  # usable samples of the passed shards
        self.epoch, self.turn, self.first = 0, 0, 0  # the current shard's epoch and place in it, and k of its first sample
        self.order: tuple[int, list[int]] = (-1, [])  # an epoch, and its shards
        self.block: tuple[tuple[int, int], list[int]] = ((-1, -1), [])  # (k of the first sample, size), and the samples
        self.prefetched = (-1, -1)
        self.held: set[int] = set()  # shards that gave samples and are not released

    def __getitem__(self, k: int) -> SampleRef:
        if k < self.first:
            self.epoch = self.turn = self.first = 0
        while True:
            shard, number = self._shards(self.epoch)[self.turn], k - self.first
            known, whole = self.counts.get(shard, WHOLE), True
            if number < known:
                block, size = self._block_of(number)
                known, whole = self.samples.usable(shard, block + size)
            if number < known:
                size = min(size, known - block)
                if whole and number >= size // 2:  # not earlier: the first batch would wait for the prefetch
                    self._prefetch_next()
                self.held.add(shard)
                return SampleRef(self.source, self.number, shard, self._shuffled_block(shard, block, size)[number - block])
            self.counts[shard] = known
            self._advance(known)
            if self.held:
                self._release(shard)

    def _advance(self, count: int) -> None:
        """Go to the next shard. Raises UserError if all shards of the source are empty."""
        self.first, self.turn = self.first + count, self.turn + 1
        if self.turn < len(self.shards):
            return
        if not any(self.counts.values()):
            if len(self.shards) == len(self.spare):
                raise self.samples.nothing_usable()
            self.shards, self.turn, self.order = list(self.spare), 0, (-1, [])
            return
        self.epoch, self.turn = self.epoch + 1, 0

    def _prefetch_next(self) -> None:
        if self.prefetched == (self.epoch, self.turn):
            return
        self.prefetched = self.epoch, self.turn
        self.samples.prefetch(self._next())

    def _next(self) -> int:
        last = self.turn + 1 == len(self.shards)
        return self._shuffled(self.epoch + 1)[0] if last else self._shards(self.epoch)[self.turn + 1]

    def _release(self, passed: int) -> None:
        """Release all shards except the current shard, the next and the passed one, which other processes may still read."""
        kept = {passed, self._shards(self.epoch)[self.turn], self._next()}
        for shard in self.held - kept:
            self.samples.release(shard)
        self.held &= kept

    def _shards(self, epoch: int) -> list[int]:
        if self.order[0] != epoch:
            self.order = epoch, self._shuffled(epoch)
        return self.order[1]

    def _shuffled(self, epoch: int) -> list[int]:
        shards = list(self.shards)
        random.Random(f"{self.seed}/{epoch}/{self.number}").shuffle(shards)
        return shards

    def _block_of(self, number: int) -> tuple[int, int]:
        """Return the first sample and the size of a sample's block. The first blocks of a shard are small, to start early."""
        first, size = 0, min(FIRST_BLOCK, self.shuffle)
        while size < self.shuffle and number >= first + size:
            first, size = first + size, min(2 * size, self.shuffle)
        return number - (number - first) % size, size

    def _shuffled_block(self, shard: int, first: int, size: int) -> list[int]:
        """Return the shuffled samples of the block that begins at sample `first` of the shard."""
        place = self.first + first, size
        if self.block[0] != place:
            numbers = list(range(first, first + size))
            random.Random(f"{self.seed}/{self.epoch}/{self.number}/{shard}/{first}").shuffle(numbers)
            self.block = place, numbers
        return self.block[1]


class Turns:
    """Weighted turns: maps each turn's number to a part. Parts of nearly equal weights take turns: `number mod parts`."""

    def __init__(self, weights: Sequence[float]) -> None:
        if max(weights) <= min(weights) * NEARLY:
            self.quota = [1] * len(weights)
        else:
            ends = [round(MIX * end / sum(weights)) for end in accumulate(weights)]
            quota = [max(end - start, 1) for start, end in zip([0, *ends], ends, strict=False)]
            divisor = math.gcd(*quota)
            self.quota = [share // divisor for share in quota]
        spread = [((turn + 0.5) / share, part, turn) for part, share in enumerate(self.quota) for turn in range(share)]
        self.turns = [(part, turn) for _, part, turn in sorted(spread)]

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Return the part of a turn, and the number of earlier turns of this part."""
        round_, place = divmod(number, len(self.turns))
        part, turn = self.turns[place]
        return part, round_ * self.quota[part] + turn


def deal_shards(shards: Sequence[int], sizes: Sequence[float], lanes: int) -> list[list[int]]:
    """Return the shards of each lane: at most `lanes` lanes of about equal size.

    sizes: of each shard, by its number. A shard far below the mean size does not get a lane.
    """
    mean = sum(sizes) / len(sizes)
    loads = [(0.0, lane) for lane in range(min(lanes, sum(size * SMALL >= mean for size in sizes)))]
    hands: list[list[int]] = [[] for _ in loads]
    for shard in shards:
        load, lane = loads[0]
        hands[lane].append(shard)
        heapq.heapreplace(loads, (load + sizes[shard], lane))
    return [hand for hand in hands if hand]


class Order:
    """The endless order of a training: sources by weight, each dealt to at most `lanes` lanes."""

    def __init__(
        self, sources: Sequence[Samples], weights: Sequence[float], *, seed: int | str = 0, shuffle: int = 512, lanes: int = 16
    ) -> None:
        if min(weights) * MIX < sum(weights):
            raise UserError(f"data.sources: every weight must be above 1/{MIX} of their sum, but they are {list(weights)}")
        self.lanes: list[Lane] = []
        self.sources = Turns(weights)
        self.turns: list[tuple[int, Turns]] = []  # of each source: the number of its first lane, and the turns over its lanes
        for number, samples in enumerate(sources):
            shards = list(range(len(samples.urls)))
            random.Random(f"{seed}/{number}").shuffle(shards)
            few = len(shards) <= FEW * lanes  # lanes of many shards are about equally long
            sizes = [samples.weight(shard) if few else 1.0 for shard in range(len(shards))]
            hands = deal_shards(shards, sizes, lanes)
            self.turns.append((len(self.lanes), Turns([sum(sizes[shard] for shard in hand) for hand in hands])))
            options: dict[str, Any] = {"seed": f"{seed}/{number}", "shuffle": max(shuffle, 1), "spare": range(len(shards))}
            for hand in hands:
                self.lanes.append(Lane(samples, hand, source=number, number=len(self.lanes), **options))

    @property
    def quotas(self) -> list[list[int]]:
        """Return the number of samples that each lane of each source gives in a round."""
        return [turns.quota for _, turns in self.turns]

    def turn(self, position: int) -> tuple[int, int]:
        """Return the lane of a position, and the number of earlier positions of this lane."""
        source, number = self.sources[position]
        first, turns = self.turns[source]
        lane, k = turns[number]
        return first + lane, k

    def batch(self, positions: range, rank: int = 0, world_size: int = 1) -> list[tuple[int, SampleRef]]:
        """Return (position, sample) of a rank's slice of a global batch, sorted by lane: a rank reads few lanes."""
        turns = sorted((*self.turn(position), position) for position in positions)
        size = len(turns) // world_size
        return [(position, self.lanes[lane][k]) for lane, k, position in turns[rank * size : (rank + 1) * size]]


class BucketOrder:
    """An order whose global batches have one shape each.

    The samples of `WINDOW` global batches are sorted by aspect ratio and cut into batches, which are shuffled. A batch has the
    shape nearest to its middle sample. Every sample comes once per epoch. All ranks read the aspect ratios of all lanes.
    """

    def __init__(self, order: Order, shapes: Sequence[Shape], *, batch_size: int, seed: int | str = 0) -> None:
        self.order, self.shapes, self.size, self.seed = order, tuple(shapes), batch_size, seed

    def batch(self, positions: range, rank: int = 0, world_size: int = 1) -> list[tuple[int, SampleRef]]:
        window, number = divmod(positions.start // self.size, WINDOW)
        batch = self._window(window)[number]
        size = len(batch) // world_size
        rank_slice = batch[rank * size : (rank + 1) * size]
        return [(positions.start + rank * size + i, ref) for i, ref in enumerate(rank_slice)]

    @lru_cache(2)  # noqa: B019
    def _window(self, number: int) -> list[list[SampleRef]]:
        first, size = number * WINDOW * self.size, self.size
        refs = [ref for _, ref in self.order.batch(range(first, first + WINDOW * size))]
        codes = [self.order.lanes[ref.lane].samples.aspect(ref.shard, ref.sample) for ref in refs]
        rng = random.Random(f"{self.seed}/{number}")
        numbers = list(range(len(refs)))
        rng.shuffle(numbers)  # so that pictures of one ratio come from all lanes
        by_aspect = sorted(numbers, key=lambda i: codes[i])
        batches = []
        for start in range(0, len(refs), size):
            chosen = by_aspect[start : start + size]
            shape = self.shapes[nearest(codes[chosen[size // 2]], self.shapes)]
            batches.append([refs[i]._replace(shape=shape) for i in sorted(chosen)])  # neighbours by lane
        rng.shuffle(batches)
        return batches


def one_pass(
    samples: Samples, batch_size: int, *, shapes: Sequence[Shape] = (), by_shard: bool = False
) -> Iterator[list[SampleRef]]:
    """Yield every sample once, in order, in batches of at most `batch_size` samples of one shape.

    by_shard: no batch has samples of two shards.
    """
    batch: list[SampleRef] = []
    released = 0
    for shard in range(len(samples.urls)):
        if shard + 1 < len(samples.urls):
            samples.prefetch(shard + 1)
        count, _ = samples.usable(shard, WHOLE)
        refs = [SampleRef(0, 0, shard, number) for number in range(count)]
        if shapes:
            refs = [ref._replace(shape=shapes[nearest(samples.aspect(shard, ref.sample), tuple(shapes))]) for ref in refs]
            refs.sort(key=lambda ref: shapes.index(ref.shape))  # type: ignore[arg-type]
        for ref in refs:
            if len(batch) == batch_size or (batch and batch[-1].shape != ref.shape):
                yield batch
                batch = []
            batch.append(ref)
        if by_shard and batch:
            yield batch
            batch = []
        oldest = batch[0].shard if batch else shard + 1
        for passed in range(released, oldest - 1):  # other processes may still read shard oldest - 1
            samples.release(passed)
            released = oldest - 1
    if batch:
        yield batch
