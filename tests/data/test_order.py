"""The sample order is a function of shard names, seed and position. A lane counts the samples of a shard that it reaches."""

import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.buckets import SQUARE, nearest
from lcm.data.order import FIRST_BLOCK, MIX, WINDOW, BucketOrder, Order, SampleRef, Turns, one_pass

COUNTS = (11, 0, 12, 13, 1, 9)
SIZE = sum(COUNTS)
EVERY = {(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)}
SHAPES = [(64, 64), (48, 80), (80, 48), (32, 128)]


class Counts:
    """A source of shards with the given sample counts.

    scanned: whether the counts are known at once. Otherwise the source knows only the samples that an order asks for.
    asked: the most samples that an order asks of each shard. prefetched, released: the shards of an order's calls.
    """

    def __init__(self, counts: Sequence[int], scanned: bool = True) -> None:
        self.counts, self.scanned = counts, scanned
        self.urls = [f"{shard:06d}.tar" for shard in range(len(counts))]
        self.asked: dict[int, int] = {}
        self.prefetched: list[int] = []
        self.released: list[int] = []

    def usable(self, shard: int, count: int) -> tuple[int, bool]:
        self.asked[shard] = max(count, self.asked.get(shard, 0))
        return (self.counts[shard], True) if self.scanned else (min(count, self.counts[shard]), count > self.counts[shard])

    def aspect(self, shard: int, sample: int) -> int:
        """Return the code of a random aspect ratio. Squares are the most frequent."""
        return min(max(round(random.Random(f"{shard}/{sample}").gauss(SQUARE, 24)), 0), 255)

    def weight(self, shard: int) -> float:
        return float(self.counts[shard] or 1)

    def prefetch(self, shard: int) -> None:
        self.prefetched.append(shard)

    def release(self, shard: int) -> None:
        self.released.append(shard)

    def nothing_usable(self) -> UserError:
        return UserError("nothing usable")


def order(counts: Sequence[int] = COUNTS, **options: Any) -> Order:
    return Order([Counts(counts)], [1.0], **options)


def refs(order: Order | BucketOrder, positions: range, batch: int = 1, **share: int) -> list[SampleRef]:
    """Return the samples of these positions, in their order within the batches."""
    batches = (order.batch(range(first, first + batch), **share) for first in range(positions.start, positions.stop, batch))
    return [ref for part in batches for _, ref in part]


def by_lane(refs: Sequence[SampleRef]) -> dict[int, list[tuple[int, int]]]:
    samples = defaultdict(list)
    for ref in refs:
        samples[ref.lane].append((ref.shard, ref.sample))
    return samples


@pytest.mark.parametrize(("lanes", "shuffle"), [(3, 512), (100, 16)])
def test_lane_passes_every_sample_once_before_any_again(lanes: int, shuffle: int) -> None:
    samples = by_lane(refs(order(lanes=lanes, shuffle=shuffle), range(5 * SIZE)))
    whole = Counter(sample for lane in samples.values() for sample in set(lane))
    assert set(whole) == EVERY
    for lane in samples.values():
        size = len(set(lane))
        assert size == SIZE or all(whole[sample] <= 2 for sample in lane)  # an empty lane takes the shards of the source
        for start in range(0, len(lane) - size + 1, size):
            assert len(set(lane[start : start + size])) == size


def test_equal_lanes_take_turns() -> None:
    lanes = [ref.lane for ref in refs(order([100] * 8, lanes=4), range(800))]
    assert lanes == [position % 4 for position in range(800)]


def test_lanes_of_unequal_length_end_their_epochs_together() -> None:
    counts = [90, 110, 100, 95, 105, 100, 100]
    samples = by_lane(refs(order(counts, lanes=4), range(sum(counts))))
    assert sum(len(set(lane)) for lane in samples.values()) > 0.98 * sum(counts)


def test_small_last_shard_does_not_come_too_often() -> None:
    """img2dataset's last shard has fewer samples."""
    counts = [1000, 1000, 1000, 1]
    seen = Counter((ref.shard, ref.sample) for ref in refs(order(counts, lanes=16), range(10 * sum(counts))))
    assert len(seen) == sum(counts)
    assert max(seen.values()) <= 12
    assert min(seen.values()) >= 8


def test_epochs_and_seeds_differ() -> None:
    first, other = (refs(order(seed=seed, shuffle=16, lanes=2), range(2 * SIZE)) for seed in (3, 4))
    assert first[:SIZE] != first[SIZE:]
    assert first != other
    assert first == refs(order(seed=3, shuffle=16, lanes=2), range(2 * SIZE))


@pytest.mark.parametrize(
    ("shuffle", "ends"),
    [
        (0, range(1, 1001)),
        (150, [64, 192, *range(342, 1000, 150), 1000]),
    ],
)
def test_lane_is_shuffled_in_blocks(shuffle: int, ends: Sequence[int]) -> None:
    """The first blocks are small, so that a shard starts soon."""
    samples = [ref.sample for ref in refs(order([1000], shuffle=shuffle), range(1000))]
    for start, end in pairwise([0, *ends]):
        assert sorted(samples[start:end]) == list(range(start, end))
    assert shuffle == 0 or sum(b == a + 1 for a, b in pairwise(samples)) < 300


def test_shards_of_two_lanes_meet_equally_often() -> None:
    """The same order of shards in every epoch would repeat a few pairs."""
    samples = refs(order([10] * 6, shuffle=20, lanes=2), range(60_000))
    met = Counter(frozenset((a.shard, b.shard)) for a, b in zip(samples[::2], samples[1::2], strict=True))
    assert len(met) == 9
    assert max(met.values()) < 1.3 * min(met.values())


@pytest.mark.parametrize("position", [17, SIZE, 3 * SIZE + 5])
def test_position_is_found_without_those_before_it(position: int) -> None:
    straight = refs(order(shuffle=8, lanes=3), range(4 * SIZE))
    assert refs(order(shuffle=8, lanes=3), range(position, 4 * SIZE)) == straight[position:]
    used = order(shuffle=8, lanes=3)
    refs(used, range(4 * SIZE))
    assert refs(used, range(position, position + 9)) == straight[position : position + 9]  # also backwards


def test_orders_travel_to_spawned_workers() -> None:
    whole = Order([Counts(COUNTS), Counts(COUNTS)], [2.0, 1.0], shuffle=8, lanes=3)
    before = refs(whole, range(50))
    assert refs(pickle.loads(pickle.dumps(whole)), range(50)) == before


# Counts and prefetches of shards


@pytest.mark.parametrize("scanned", [False, True])
def test_first_batch_asks_for_the_first_blocks_of_the_lanes_only(scanned: bool) -> None:
    source = Counts([5000] * 1000, scanned)
    whole = Order([source], [1.0], shuffle=512, lanes=16)
    assert len(refs(whole, range(64), 64)) == 64
    assert len(source.asked) == 16
    assert set(source.asked.values()) == {FIRST_BLOCK}
    assert source.prefetched == []


@pytest.mark.parametrize(("scanned", "prefetched"), [(False, 12), (True, 14)])
def test_next_shard_is_prefetched_once(scanned: bool, prefetched: int) -> None:
    """The prefetch starts early in a scanned shard. In a downloading shard it starts late: the shard's own bytes come first."""
    source = Counts([100] * 12, scanned)
    walked = refs(Order([source], [1.0], shuffle=16, lanes=2), range(12 * 100 + 20))
    for lane in (0, 1):
        assert len(set(ref.shard for ref in walked if ref.lane == lane)) == 6
    assert len(source.prefetched) == prefetched  # 6 in each lane; a scanned source has one more in each lane


def test_shard_that_a_resume_passes_is_not_prefetched() -> None:
    source = Counts([100] * 12)
    [ref] = refs(Order([source], [1.0], shuffle=16, lanes=2), range(1060, 1061))
    assert len(source.prefetched) == 1
    assert ref.shard not in source.prefetched


def test_empty_lane_takes_the_shards_of_its_source() -> None:
    counts = [0, 7, 0, 5]
    samples = by_lane(refs(order(counts, lanes=4, shuffle=4), range(400)))
    assert {len(set(lane)) for lane in samples.values()} == {7, 5, 12}
    assert refs(order(counts, lanes=4, shuffle=4), range(350, 400)) == refs(order(counts, lanes=4, shuffle=4), range(400))[350:]


def test_source_without_usable_samples_is_a_user_error() -> None:
    with pytest.raises(UserError, match="nothing usable"):
        refs(order([0, 0, 0], lanes=3), range(1))


# Sources


def test_sources_are_taken_by_weight_exactly() -> None:
    whole = Order([Counts([300]), Counts([30])], [3, 1])
    for block in range(3):
        sources = [ref.source for ref in refs(whole, range(block * MIX, (block + 1) * MIX))]
        assert Counter(sources) == {0: 750, 1: 250}
        assert Counter(sources[:100])[0] in range(70, 81)  # mixed, not one after the other


def test_weights_hold_whatever_the_shards() -> None:
    """The third source has fewer turns than lanes."""
    sources = [Counts([30] * 3), Counts([7, 99, 40, 12]), Counts([1] * 60)]
    whole = Order(sources, [200, 797, 3], lanes=16)
    assert Counter(ref.source for ref in refs(whole, range(MIX))) == {0: 200, 1: 797, 2: 3}
    assert len({ref.lane for ref in refs(whole, range(6 * MIX)) if ref.source == 2}) == 16


def test_every_source_goes_through_its_own_epochs() -> None:
    samples = by_lane(refs(Order([Counts([30]), Counts([30])], [2, 1], shuffle=8), range(2 * MIX)))
    for lane in samples.values():
        for start in range(0, len(lane) - 30, 30):
            assert len(set(lane[start : start + 30])) == 30


@pytest.mark.parametrize("weights", [[10_000, 1], [1, -1]])
def test_weight_that_cannot_be_met_is_a_user_error(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weight"):
        Order([Counts([30]), Counts([30])], weights)


# Ranks


def test_ranks_share_out_the_same_global_batches() -> None:
    lanes, ranks = 8, 4
    whole, counts = order([40] * 16, lanes=lanes), [40] * 16
    shares = [order(counts, lanes=lanes) for _ in range(ranks)]
    for first in range(0, 640, 8):
        positions = range(first, first + 8)
        parts = [share.batch(positions, rank, ranks) for rank, share in enumerate(shares)]
        assert [entry for part in parts for entry in part] == whole.batch(positions)
        assert {len(part) for part in parts} == {8 // ranks}


def test_rank_reads_only_the_shards_of_its_lanes() -> None:
    source = [Counts([40] * 32) for _ in range(4)]
    for rank in range(4):
        refs(Order([source[rank]], [1.0], lanes=8), range(32 * 40), 16, rank=rank, world_size=4)
    assert [len(part.asked) for part in source] == [8, 8, 8, 8]
    assert len(set().union(*(part.asked for part in source))) == 32


def test_64_ranks_share_out_100_000_shards() -> None:
    """A lane draws each sample once in an epoch. A resume at three steps with another world size draws the same samples."""
    rng = random.Random(0)
    counts, lanes, batch = [rng.choice((0, 0, 0, 0, 1, 2)) for _ in range(100_000)], 128, 2
    source = Counts(counts)
    size, epoch = 64 * batch, max(by_lane_sizes(counts, lanes))
    ranks = [Order([source], [1.0], lanes=lanes, shuffle=2) for _ in range(64)]
    samples: dict[int, list[tuple[int, int]]] = defaultdict(list)
    steps = epoch * lanes // size + 1
    batches: dict[int, list[SampleRef]] = {}
    for step in range(steps):
        positions = range(step * size, (step + 1) * size)
        parts = [ref for rank, part in enumerate(ranks) for _, ref in part.batch(positions, rank, 64)]
        if step in (1, steps // 3, steps - 2):
            batches[step] = parts
        for ref in parts:
            samples[ref.lane].append((ref.shard, ref.sample))
    names: set[tuple[int, int]] = set()
    for lane in samples.values():
        first = list(dict.fromkeys(lane))
        assert lane[: len(first)] == first  # no sample repeats before the lane has drawn all its samples
        names |= set(first)
    assert names == {(shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
    for step, expected in batches.items():
        positions = range(step * size, (step + 1) * size)
        for world_size in (1, 32):
            resumed = [Order([source], [1.0], lanes=lanes, shuffle=2) for _ in range(min(world_size, 2))]
            parts = [part.batch(positions, rank, world_size) for rank, part in enumerate(resumed)]
            assert [ref for part in parts for _, ref in part] == expected[: size * len(resumed) // world_size]


def by_lane_sizes(counts: Sequence[int], lanes: int) -> list[int]:
    return [sum(counts[shard] for shard in lane.shards) for lane in order(counts, lanes=lanes).lanes]


# Batches of one shape


def bucketed(counts: Sequence[int] = (40, 0, 61, 33, 1, 70), *, batch: int = 8, **options: Any) -> BucketOrder:
    return BucketOrder(order(counts, **{"shuffle": 16, "lanes": 3, **options}), SHAPES, batch_size=batch)


@pytest.mark.parametrize(("batch", "lanes"), [(1, 5), (8, 5)])
def test_window_of_batches_has_every_sample_at_its_nearest_shape(batch: int, lanes: int) -> None:
    counts, window = [600, 600, 590], WINDOW * batch
    whole, plain, source = bucketed(counts, batch=batch, lanes=lanes), order(counts, shuffle=16, lanes=lanes), Counts(counts)
    near = total = 0
    for number in range(5):
        positions = range(number * window, (number + 1) * window)
        batches = [whole.batch(range(first, first + batch)) for first in positions[::batch]]
        assert all(len({ref.shape for _, ref in members}) == 1 for members in batches)
        assert [position for members in batches for position, _ in members] == list(positions)
        samples = [ref for members in batches for _, ref in members]
        assert Counter(ref[:4] for ref in samples) == Counter(ref[:4] for ref in refs(plain, positions))
        near += sum(ref.shape == SHAPES[nearest(source.aspect(ref.shard, ref.sample), tuple(SHAPES))] for ref in samples)
        total += len(samples)
    assert near == total if batch == 1 else near > 0.85 * total


def test_bucketed_batches_mix_shapes() -> None:
    shapes = [bucketed([100] * 16).batch(range(first, first + 8))[0][1].shape for first in range(0, 512, 8)]
    assert shapes[:WINDOW] != sorted(shapes[:WINDOW], key=SHAPES.index)
    assert shapes[:WINDOW] != shapes[WINDOW:]


def test_bucketed_batches_mix_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pictures have one shape. A batch from one shard would train on one kind of picture."""
    whole = bucketed([100] * 16, batch=16, lanes=8)
    monkeypatch.setattr(Counts, "aspect", lambda *_: SQUARE)
    assert min(len({ref.lane for _, ref in whole.batch(range(first, first + 16))}) for first in range(0, 512, 16)) >= 4


@pytest.mark.parametrize("first", [8, 32 * 8, 100 * 8])
def test_bucketed_position_is_found_without_those_before_it(first: int) -> None:
    positions = range(first, first + 8)
    straight = bucketed()
    refs(straight, range(first), 8)
    expected = straight.batch(positions)
    assert pickle.loads(pickle.dumps(bucketed())).batch(positions) == expected
    for ranks in (2, 4):
        parts = [bucketed().batch(positions, rank, ranks) for rank in range(ranks)]
        assert [entry for part in parts for entry in part] == expected


# A pass


@pytest.mark.parametrize(("shapes", "by_shard"), [((), False), (SHAPES, True)], ids=["plain", "buckets by shard"])
def test_pass_has_every_sample_once_in_order(shapes: list[tuple[int, int]], by_shard: bool) -> None:
    batches = list(one_pass(Counts(COUNTS), 4, shapes=shapes, by_shard=by_shard))
    samples = [(ref.shard, ref.sample) for batch in batches for ref in batch]
    assert len(samples) == SIZE
    assert set(samples) == EVERY
    assert samples == sorted(EVERY) if not shapes else [shard for shard, _ in samples] == sorted(shard for shard, _ in EVERY)
    assert max(map(len, batches)) == 4
    for batch in batches:
        assert len({ref.shape for ref in batch}) == 1
        assert not by_shard or len({ref.shard for ref in batch}) == 1


def test_turns_are_spread_evenly() -> None:
    turns = Turns([5, 3, 2])
    assert [turns[position][0] for position in range(10)] == [turns[position][0] for position in range(10, 20)]
    for start in range(30):
        assert Counter(turns[position][0] for position in range(start, start + 10)) == {0: 5, 1: 3, 2: 2}
    assert [turns[position][1] for position in range(40) if turns[position][0] == 1] == list(range(12))


def test_lane_releases_all_but_its_present_shard_and_the_neighbours() -> None:
    source = Counts(12 * [40])
    stream, open_shards = Order([source], [1.0], lanes=6, shuffle=8), set()
    for position in range(2 * 12 * 40):
        [(_, ref)] = stream.batch(range(position, position + 1))
        assert ref.shard not in source.released
        open_shards = open_shards - set(source.released) | {ref.shard}
        source.released.clear()
        assert len(open_shards) <= 3 * 6


def test_lane_that_is_resumed_releases_nothing_that_it_only_passes() -> None:
    source = Counts(12 * [40])
    Order([source], [1.0], lanes=2).batch(range(900, 901))
    assert not source.released


def test_pass_releases_no_shard_before_its_samples_are_read() -> None:
    source = Counts(12 * [10])
    for batch in one_pass(source, 64):
        assert not {ref.shard for ref in batch} & set(source.released)
    assert source.released == list(range(len(source.released)))
    assert len(source.released) >= 12 - 3 - 64 // 10
