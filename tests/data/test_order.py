"""Which sample comes when: each once an epoch, shuffled anew, found from its position alone."""

import pickle
from collections import Counter
from itertools import pairwise

import pytest

from lcm.core.errors import UserError
from lcm.data.order import MIX, Mixture, Order

COUNTS = (11, 0, 12, 13, 1, 9)
SIZE = sum(COUNTS)
EVERY = {(shard, index) for shard, count in enumerate(COUNTS) for index in range(count)}


def epoch(order: Order, number: int) -> list[tuple[int, int]]:
    return [order[position][2:4] for position in range(number * order.size, (number + 1) * order.size)]


@pytest.mark.parametrize("lanes", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("shuffle", [1, 4, 7, 2048])
def test_every_epoch_holds_every_sample_once(lanes: int, shuffle: int) -> None:
    order = Order(COUNTS, shuffle=shuffle, lanes=lanes)
    for number in range(3):
        samples = epoch(order, number)
        assert len(samples) == SIZE
        assert set(samples) == EVERY


def test_epochs_differ_and_seeds_differ() -> None:
    orders = [epoch(Order(COUNTS, seed=seed, shuffle=16, lanes=2), number) for seed, number in [(3, 1), (3, 2), (4, 1)]]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[0] == epoch(Order(COUNTS, seed=3, shuffle=16, lanes=2), 1)


def test_without_shuffling_the_order_is_that_of_the_shards() -> None:
    assert epoch(Order(COUNTS, lanes=4), 0) == sorted(EVERY)


def test_a_position_is_found_without_those_before_it() -> None:
    straight = [Order(COUNTS, shuffle=8, lanes=3)[position] for position in range(4 * SIZE)]
    for position in (0, 17, SIZE - 1, SIZE, 3 * SIZE + 5):
        assert Order(COUNTS, shuffle=8, lanes=3)[position] == straight[position]


def test_positions_take_turns_over_the_lanes_and_a_lane_keeps_to_few_shards() -> None:
    order = Order([100] * 8, shuffle=50, lanes=4)
    assert [order[position].lane for position in range(8)] == [0, 1, 2, 3] * 2
    shards = {(place.lane, place.shard) for place in (order[position] for position in range(order.size))}
    assert len(shards) == 8  # two whole shards a lane


def test_a_lane_is_shuffled_in_blocks() -> None:
    order = Order([1000], shuffle=10)
    indices = [order[position].sample for position in range(1000)]
    for start in range(0, 1000, 10):
        assert sorted(indices[start : start + 10]) == list(range(start, start + 10))
    assert sum(b == a + 1 for a, b in pairwise(indices)) < 300


def test_two_samples_are_neighbours_no_oftener_than_chance_has_it() -> None:
    """Over many epochs each pair of shards meets: a shuffle that kept neighbours together would repeat a few pairs."""
    order = Order([10] * 6, shuffle=20, lanes=2)
    pairs = Counter(
        frozenset((order[p].shard, order[p + 1].shard)) for e in range(1000) for p in range(e * 60, (e + 1) * 60 - 1)
    )
    assert len([pair for pair in pairs if len(pair) == 2]) == 15
    assert max(pairs[p] for p in pairs if len(p) == 2) < 1.3 * min(pairs[p] for p in pairs if len(p) == 2)


def mixture(*weights: float) -> Mixture:
    return Mixture([Order([30], shuffle=8, seed=n, source=n) for n in range(len(weights))], weights)


def test_sources_are_taken_by_weight_exactly() -> None:
    both = mixture(3, 1)
    for block in range(3):
        places = [both[position].source for position in range(block * MIX, (block + 1) * MIX)]
        assert Counter(places) == {0: 750, 1: 250}
        assert Counter(places[:100])[0] in range(55, 95)  # mixed, not one after the other


def test_every_source_goes_through_its_own_epochs() -> None:
    both = mixture(2, 1)
    for source in (0, 1):
        of = [place.sample for place in (both[position] for position in range(2 * MIX)) if place.source == source]
        for start in range(0, len(of) - 30, 30):
            assert sorted(of[start : start + 30]) == list(range(30))


def test_a_weight_too_small_to_be_met_is_a_user_error() -> None:
    with pytest.raises(UserError, match="weight"):
        mixture(10_000, 1)


def test_orders_travel_to_spawned_workers() -> None:
    order = mixture(1, 1)
    before = [order[position] for position in range(50)]
    copy = pickle.loads(pickle.dumps(order))
    assert [copy[position] for position in range(50)] == before
