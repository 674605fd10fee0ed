"""Batches of one shape in an order that is a function of the position alone, and loses no sample."""

import pickle
import random
from collections import Counter

import pytest

from lcm.core.errors import UserError
from lcm.data.buckets import SQUARE, nearest
from lcm.data.epochs import Turns, training_order, validation_order
from lcm.data.order import Mixture, Order
from lcm.data.source import Facts

SHAPES = [(64, 64), (48, 80), (80, 48), (32, 128)]


def facts(*counts: int, seed: int = 0) -> list[Facts]:
    """Shards of pictures of all proportions, squares most often."""
    rng = random.Random(seed)
    codes = [bytes(min(max(round(rng.gauss(SQUARE, 24)), 0), 255) for _ in range(count)) for count in counts]
    return [Facts(len(of), {}, of) for of in codes]


def turns(of: list[Facts], *, batch: int = 8, shuffle: int = 16, lanes: int = 3, seed: int = 0) -> Turns:
    return Turns([of], [1.0], SHAPES, batch=batch, seed=seed, shuffle=shuffle, lanes=lanes)


SHARDS = facts(40, 0, 61, 33, 1, 70)
TOTAL = sum(shard.samples for shard in SHARDS)


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
@pytest.mark.parametrize("lanes", [1, 5])
def test_batches_are_of_one_shape_and_every_sample_comes_once_an_epoch_of_its_bucket(batch: int, lanes: int) -> None:
    order = turns(SHARDS, batch=batch, lanes=lanes)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {shape: [] for shape in SHAPES}
    for first in range(0, 5 * TOTAL, batch):
        places = [order[position] for position in range(first, first + batch)]
        [shape] = {place.shape for place in places}
        seen[shape] += [place[2:4] for place in places]
    for number, shape in enumerate(SHAPES):
        own = {
            (shard, sample)
            for shard, of in enumerate(SHARDS)
            for sample, code in enumerate(of.aspects)
            if nearest(code, SHAPES) == number
        }
        assert own
        assert len(seen[shape]) > 4 * len(own) - batch
        for start in range(0, len(seen[shape]) - len(own) + 1, len(own)):
            stretch = seen[shape][start : start + len(own)]
            assert len(stretch) == len(set(stretch))
            assert set(stretch) == own


@pytest.mark.parametrize(("count", "batch"), [(205, 8), (5000, 1), (205, 150)], ids=["one round", "five rounds", "large"])
def test_an_epoch_leaves_less_than_a_batch_of_each_bucket_to_the_next(count: int, batch: int) -> None:
    order = turns(facts(count), batch=batch)
    sizes, done, number = [bucket.size for bucket in order.buckets], Counter[tuple[int, int]](), 0
    assert sum(sizes) == count
    for epoch in range(1, 4):
        due = {bucket.shape: epoch * bucket.size // batch for bucket in order.buckets}
        while number < sum(due.values()):
            done[order[number * batch].shape] += 1
            number += 1
        assert due == {shape: done[shape] for shape in due}


def test_a_large_epoch_takes_turns_evenly() -> None:
    order = turns(facts(20_000), batch=2)
    shares = [
        Counter(order[number * 2].shape for number in range(start, start + 1000))[SHAPES[0]] for start in range(0, 9000, 1000)
    ]
    assert max(shares) - min(shares) <= 3
    first = [order[number * 2].shape for number in range(1000)]
    assert first != sorted(first, key=SHAPES.index)
    second = [order[number * 2].shape for number in range(1000, 2000)]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 900


def test_a_position_is_found_without_those_before_it_also_in_another_process() -> None:
    order = turns(SHARDS)
    straight = [order[position] for position in range(4 * TOTAL)]
    copy = pickle.loads(pickle.dumps(turns(SHARDS)))
    for position in (0, 17, TOTAL, 3 * TOTAL + 5):
        assert turns(SHARDS)[position] == copy[position] == straight[position]


def test_seeds_and_epochs_differ() -> None:
    first, other = ([order[p] for p in range(2 * TOTAL)] for order in (turns(SHARDS, seed=1), turns(SHARDS, seed=2)))
    assert first != other
    assert first[:TOTAL] != first[TOTAL:]


def test_batches_of_all_shapes_come_from_the_shards_at_hand() -> None:
    """Else a rank would keep as many shards open, or bring as many here, as there are buckets."""
    order = turns(facts(*[100] * 40), batch=4, shuffle=200, lanes=1)
    for start in range(0, 3600, 400):
        assert len({order[position].shard for position in range(start, start + 400)}) <= 12


def test_sources_keep_to_their_weights_and_batches_to_one_source() -> None:
    sources = [facts(300), facts(50, 50, seed=1)]
    order = Turns(sources, [1, 3], SHAPES, batch=4, shuffle=16, lanes=2)
    batches = [[order[position] for position in range(start, start + 4)] for start in range(0, 8000, 4)]
    assert all(len({(place.source, place.shape) for place in batch}) == 1 for batch in batches)
    assert Counter(batch[0].source for batch in batches)[1] == pytest.approx(1500, abs=15)
    of = [place[2:4] for batch in batches for place in batch if place[0] == 1 and place.shape == SHAPES[0]]
    size = next(bucket.size for bucket in order.buckets if bucket.source == 1 and bucket.shape == SHAPES[0])
    assert len(set(of[:size])) == len(set(of[size : 2 * size])) == size
    with pytest.raises(UserError, match="weight"):
        Turns(sources, [1, 0], SHAPES, batch=4, shuffle=16, lanes=2)


def test_a_validation_pass_goes_bucket_after_bucket() -> None:
    order = validation_order(SHARDS, SHAPES)
    places = [order[position] for position in range(order.size)]
    assert len({place[2:4] for place in places}) == order.size == TOTAL == order.cuts[-1]
    for first, end in zip([0, *order.cuts], order.cuts, strict=False):
        assert len({place.shape for place in places[first:end]}) == 1
        assert [place[2:4] for place in places[first:end]] == sorted(place[2:4] for place in places[first:end])


def test_without_buckets_orders_are_what_they_were() -> None:
    options = {"batch": 8, "seed": 3, "shuffle": 16, "lanes": 3}
    one, [order] = training_order([SHARDS], [2.0], [], **options)
    assert one is order
    assert [one[p] for p in range(300)] == [
        Order([40, 0, 61, 33, 1, 70], seed="3/0", shuffle=16, lanes=3)[p] for p in range(300)
    ]
    both, orders = training_order([SHARDS, SHARDS], [2.0, 1.0], [], **options)
    assert [both[p] for p in range(300)] == [Mixture(orders, [2.0, 1.0], 3)[p] for p in range(300)]


def test_no_sample_at_all_is_a_user_error_that_counts() -> None:
    with pytest.raises(UserError, match=r"1 shards hold no usable sample: left out are \{'side': 4\}"):
        training_order([[Facts(0, {"side": 4})]], [1.0], SHAPES, batch=4, seed=0, shuffle=4, lanes=1)
