"""Which sample comes at which position: the endless order of a training, a pure function of (seed, position).

Nothing here reads a shard. Any position is found without walking the ones before it, so a run goes on from one integer, and any
number of ranks and workers can share out the same order.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

from lcm.core.errors import UserError

MIX = 1000  # positions over which several sources keep to their weights exactly


class Place(NamedTuple):
    """Sample number `sample` of shard number `shard` of source number `source`; `lane` is where in the order it lies.

    shape: (height, width) that its picture shall have, None for that of all.
    """

    source: int
    lane: int
    shard: int
    sample: int
    shape: tuple[int, int] | None = None


class Places(Protocol):
    """An order of any kind."""

    def __getitem__(self, position: int) -> Place: ...


class Order:
    """Positions of shards of `counts` samples: epoch e is positions `[e S, (e + 1) S)`, each of the S samples once.

    An epoch permutes the shards, strings their samples together and cuts the string into `lanes` equal parts. Positions take
    turns over the lanes, so that a batch mixes that many shards, and a rank that keeps to some lanes keeps to their shards.
    Within a lane, samples are shuffled in blocks of `shuffle`; 0 is the shards as they are, for one ordered pass.
    """

    shape: tuple[int, int] | None = None  # of a bucket
    cuts: Sequence[int] = ()  # positions at which a batch must end

    def __init__(
        self, counts: Sequence[int], *, seed: int | str = 0, shuffle: int = 0, lanes: int = 1, source: int = 0
    ) -> None:
        self.counts, self.seed, self.shuffle, self.source = list(counts), seed, shuffle, source
        self.lanes, self.size = lanes if shuffle else 1, sum(counts)

    def __getitem__(self, position: int) -> Place:
        epoch, position = divmod(position, self.size)
        k, lane = divmod(position, self.lanes)
        each, more = divmod(self.size, self.lanes)  # the first `more` lanes have one sample more
        start, length = lane * each + min(lane, more), each + (lane < more)
        if self.shuffle:
            first = k - k % self.shuffle
            k = first + self._block(epoch, lane, first, min(self.shuffle, length - first))[k - first]
        shards, ends = self._epoch(epoch)
        which = bisect_right(ends, start + k)
        return Place(self.source, lane, shards[which], start + k - (ends[which - 1] if which else 0))

    @lru_cache(128)  # noqa: B019 - an order lives as long as its process; buckets have one each
    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The epoch's shards in their order, and where in the string of samples each ends."""
        shards = list(range(len(self.counts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        return shards, list(accumulate(self.counts[shard] for shard in shards))

    @lru_cache(256)  # noqa: B019
    def _block(self, epoch: int, lane: int, first: int, size: int) -> list[int]:
        order = list(range(size))
        random.Random(f"{self.seed}/{epoch}/{lane}/{first}").shuffle(order)
        return order


class Mixture:
    """Orders taken by weight: of every `MIX` positions each source has its share, rounded, at shuffled places."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int = 0) -> None:
        self.orders, self.seed = list(orders), seed
        ends = [round(MIX * end / sum(weights)) for end in accumulate(weights)]
        self.quota = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if min(self.quota) < 1:
            raise UserError(f"a source's weight is below 1/{MIX} of the sum of data.sources: {list(weights)}")

    def __getitem__(self, position: int) -> Place:
        block, k = divmod(position, MIX)
        source, turn = self._turns(block)[k]
        return self.orders[source][block * self.quota[source] + turn]

    @lru_cache(16)  # noqa: B019
    def _turns(self, block: int) -> list[tuple[int, int]]:
        return shuffled_turns(self.quota, f"{self.seed}/{block}")


def shuffled_turns(quota: Sequence[int], seed: str) -> list[tuple[int, int]]:
    """Each number n `quota[n]` times, shuffled, with how many of n came before."""
    numbers = [number for number, times in enumerate(quota) for _ in range(times)]
    random.Random(seed).shuffle(numbers)
    before = [0] * len(quota)
    turns = []
    for number in numbers:
        turns.append((number, before[number]))
        before[number] += 1
    return turns
