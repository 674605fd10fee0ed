"""The orders of a training and of a validation: of all samples, or of batches of one shape.

A bucket is a subset of a source's samples with an order of its own, and whole global batches take turns over the buckets. So
every rank has the same shape at the same step, and one position still tells all.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from lcm.core.errors import UserError
from lcm.data.buckets import Shape, nearest
from lcm.data.order import MIX, Mixture, Order, Place, Places, shuffled_turns
from lcm.data.shards import advice
from lcm.data.source import Facts, total_dropped


def training_order(
    facts: Sequence[Sequence[Facts]],
    weights: Sequence[float],
    shapes: Sequence[Shape],
    *,
    batch: int,
    seed: int,
    shuffle: int,
    lanes: int,
) -> tuple[Places, Sequence[Order]]:
    """Of sources with these weights: the endless order, and what it is made of. batch: the global one, which only buckets need.

    Raises UserError where a source has no sample.
    """
    for source in facts:
        if not any(counts(source)):
            raise nothing_usable(source, "data.shards")
    if shapes:
        turns = Turns(facts, weights, shapes, batch=batch, seed=seed, shuffle=shuffle, lanes=lanes)
        return turns, turns.buckets
    orders = [
        Order(counts(source), seed=f"{seed}/{number}", shuffle=shuffle, lanes=lanes, source=number)
        for number, source in enumerate(facts)
    ]
    return (orders[0] if len(orders) == 1 else Mixture(orders, weights, seed)), orders


def validation_order(facts: Sequence[Facts], shapes: Sequence[Shape]) -> "Order | Chain":
    """Return one ordered, complete pass. Raises UserError where there is no sample."""
    if not any(counts(facts)):
        raise nothing_usable(facts, "data.val_shards (null: no validation)")
    return Chain(buckets_of(facts, shapes)) if shapes else Order(counts(facts))


def nothing_usable(facts: Sequence[Facts], option: str) -> UserError:
    dropped = total_dropped(facts)
    return UserError(
        f"{len(facts)} shards hold no usable sample: left out are {dict(dropped)}; change {option} or data.filters"
        f"{advice(dropped)}"
    )


def counts(facts: Sequence[Facts]) -> list[int]:
    return [shard.samples for shard in facts]


class Bucket(Order):
    """The samples of bucket `number` in an order of their own. shards: of each shard, the bucket of each sample as a byte."""

    def __init__(
        self, shards: Sequence[bytes], number: int, shape: Shape, *, seed: int | str, shuffle: int, lanes: int, source: int
    ) -> None:
        counts = [shard.count(number) for shard in shards]
        super().__init__(counts, seed=seed, shuffle=shuffle, lanes=lanes, source=source)
        self.shards, self.number, self.shape = shards, number, shape

    def __getitem__(self, position: int) -> Place:
        place = super().__getitem__(position)
        return place._replace(sample=self._members(place.shard)[place.sample], shape=self.shape)

    @lru_cache(1024)  # noqa: B019 - an order lives as long as its process
    def _members(self, shard: int) -> array:
        return array("I", (sample for sample, number in enumerate(self.shards[shard]) if number == self.number))


def buckets_of(
    facts: Sequence[Facts], shapes: Sequence[Shape], *, seed: int | str = 0, shuffle: int = 0, lanes: int = 1, source: int = 0
) -> list[Bucket]:
    """The buckets of a source that have samples. All permute its shards alike and shuffle over the same stretch of them, so
    that batches of every shape come from the shards that are at hand."""
    table = bytes(nearest(code, shapes) for code in range(256))
    shards = [shard.aspects.translate(table) for shard in facts]
    total, sizes = sum(map(len, shards)), [sum(shard.count(number) for shard in shards) for number in range(len(shapes))]
    return [
        Bucket(shards, number, shape, seed=seed, shuffle=-(-shuffle * size // total), lanes=lanes, source=source)
        for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
        if size
    ]


class Turns:
    """The endless order of a training: every `batch` positions are of one bucket, each bucket has its share of the batches.

    By the end of epoch e, bucket b with n_b samples has had floor(e n_b / batch) batches: what is left, less than a batch,
    opens the bucket's next epoch. Nothing is lost or seen twice; buckets are spread evenly, at shuffled places. Several sources
    have buckets of their own, so a batch is of one source; in place of n_b is then what their weights make of it.
    """

    def __init__(
        self,
        facts: Sequence[Sequence[Facts]],
        weights: Sequence[float],
        shapes: Sequence[Shape],
        *,
        batch: int,
        seed: int = 0,
        shuffle: int,
        lanes: int,
    ) -> None:
        if min(weights) <= 0:
            raise UserError(f"a source's weight in data.sources is not above zero: {list(weights)}")
        self.batch, self.seed = batch, seed
        self.buckets: list[Bucket] = []
        self.sizes: list[int] = []
        totals = [sum(shard.samples for shard in source) for source in facts]
        for number, (source, weight, total) in enumerate(zip(facts, weights, totals, strict=True)):
            share = weight / sum(weights) * sum(totals) / total  # 1 if there is one source
            own = buckets_of(source, shapes, seed=f"{seed}/{number}", shuffle=shuffle, lanes=lanes, source=number)
            self.buckets += own
            self.sizes += [max(1, round(bucket.size * share)) for bucket in own]
        self.rounds = max(1, sum(self.sizes) // (MIX * batch))  # of an epoch; each is shuffled as a whole

    def __getitem__(self, position: int) -> Place:
        number, k = divmod(position, self.batch)
        bucket, turn = self._turn(number)
        return self.buckets[bucket][turn * self.batch + k]

    @lru_cache(64)  # noqa: B019
    def _turn(self, number: int) -> tuple[int, int]:
        """Of global batch `number` the bucket, and how many batches of that bucket came before."""
        last = (number + len(self.sizes) + 1) * self.rounds * self.batch // sum(self.sizes) + 1
        rounds = bisect_right(range(last + 1), number, key=self._before) - 1
        bucket, turn = self._turns(rounds)[number - self._before(rounds)]
        return bucket, self._of(bucket, rounds) + turn

    def _of(self, bucket: int, rounds: int) -> int:
        return rounds * self.sizes[bucket] // (self.rounds * self.batch)

    def _before(self, rounds: int) -> int:
        return sum(self._of(bucket, rounds) for bucket in range(len(self.sizes)))

    @lru_cache(16)  # noqa: B019
    def _turns(self, rounds: int) -> list[tuple[int, int]]:
        ends = [(self._of(bucket, rounds), self._of(bucket, rounds + 1)) for bucket in range(len(self.sizes))]
        return shuffled_turns([end - start for start, end in ends], f"{self.seed}/{rounds}")


class Chain:
    """One ordered pass, bucket after bucket. cuts: positions at which a bucket ends."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets, self.cuts = list(buckets), list(accumulate(bucket.size for bucket in buckets))
        self.size = sum(bucket.size for bucket in buckets)

    def __getitem__(self, position: int) -> Place:
        bucket = bisect_right(self.cuts, position)
        return self.buckets[bucket][position - (self.cuts[bucket - 1] if bucket else 0)]
