"""Batches in one order whatever the workers and ranks, from any position on, and what damage does to them."""

import copy
import errno
import itertools
import os
import random
import resource
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.buckets import aspect
from lcm.data.epochs import training_order, validation_order
from lcm.data.sample_fields import Skip
from lcm.data.order import Mixture, Order
from lcm.data.shards import Shard
from lcm.data.source import Source
from lcm.data.stream import ShardStream
from lcm.data.transforms import Decode, collate
from tests.data.conftest import SIZES, gather, keep, keys, pairs, png, stream, take, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
EVERY = [f"{shard}-{i:02d}" for shard, size in enumerate(SIZES) for i in range(size)]


def test_epochs_follow_each_other_without_loss(urls: list[str]) -> None:
    batches = keys(take(stream(urls, batch_size=5), 27))
    for start in (0, 45, 90):
        assert sorted(batches[start : start + 45]) == EVERY


@pytest.mark.parametrize(("workers", "context"), [(1, "fork"), (2, "fork"), (4, "fork"), (2, "spawn"), (4, "spawn")])
def test_the_order_and_the_draws_do_not_depend_on_the_workers(urls: list[str], workers: int, context: str) -> None:
    assert take(stream(urls), 14, workers, context) == take(stream(urls), 14)


def in_turns(whole: ShardStream, count: int | None, workers: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches of a DataLoader with so many workers, without processes."""
    turns = []
    for number in range(max(workers, 1)):
        info = SimpleNamespace(id=number, num_workers=workers) if workers else None
        own = iter(copy.copy(whole))
        with patch.context() as patched:
            patched.setattr("lcm.data.stream.get_worker_info", lambda info=info: info)
            first = list(itertools.islice(own, 1))  # a worker learns its number with its first batch
        turns.append(itertools.chain(first, own))
    batches = (next(turn, None) for turn in itertools.cycle(turns))
    return list(itertools.islice(itertools.takewhile(bool, batches), count))


def test_workers_in_turns_are_those_of_a_loader(urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_turns(stream(urls), 14, 3, monkeypatch) == take(stream(urls), 14, 3)
    assert in_turns(stream(urls, shuffle=0), None, 2, monkeypatch) == take(stream(urls, shuffle=0), None, 2)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("workers", range(5))
def test_every_sample_once_an_epoch_over_ranks_and_workers(
    urls: list[str], ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = [stream(urls, batch_size=5, rank=rank, world_size=ranks) for rank in range(ranks)]
    seen = Counter(key for share in of for key in keys(in_turns(share, 9, workers, monkeypatch)))
    assert seen == dict.fromkeys(EVERY, ranks)  # as many epochs

    of = [stream(urls, batch_size=3, shuffle=0, rank=rank, world_size=ranks) for rank in range(ranks)]
    seen = Counter(key for share in of for key in keys(in_turns(share, None, workers, monkeypatch)))
    assert set(seen) == set(EVERY)
    assert seen.total() - len(EVERY) < ranks  # no rank is left without a last batch


@pytest.mark.parametrize(("ranks", "workers", "context"), [(8, 1, "fork"), (2, 4, "fork"), (2, 1, "spawn")])
def test_every_sample_once_an_epoch_over_processes(urls: list[str], ranks: int, workers: int, context: str) -> None:
    of = [stream(urls, batch_size=5, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert Counter(key for share in of for key in keys(take(share, 9, workers, context))) == dict.fromkeys(EVERY, ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_out_the_same_global_batches(urls: list[str], ranks: int) -> None:
    whole = take(stream(urls, batch_size=8), 14)
    shares = [take(stream(urls, batch_size=8 // ranks, rank=rank, world_size=ranks), 14) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(keys(parts)) == sorted(batch["keys"])
        assert {part["position"] for part in parts} == {batch["position"]}


def test_a_rank_keeps_to_its_shards(tmp_path: Path) -> None:
    """With as many lanes as ranks, each reads its own part of an epoch: no shard is brought to every node."""
    shards = [write_shard(tmp_path / f"{n}.tar", pairs(n, 16)) for n in range(8)]
    shares = [take(stream(shards, lanes=4, batch_size=8, rank=rank, world_size=4), 4) for rank in range(4)]
    read = [{key.partition("-")[0] for key in keys(share)} for share in shares]
    assert [len(of) for of in read] == [2, 2, 2, 2]
    assert len(set.union(*read)) == 8


def test_a_stream_goes_on_from_the_position_of_any_batch(urls: list[str]) -> None:
    """Three epochs of 45 samples, so that some batches hold samples of two epochs and one ends with an epoch."""
    straight = take(stream(urls, batch_size=5), 28)
    for done in range(25):
        assert take(stream(urls, batch_size=5, start=straight[done]["position"]), 3) == straight[done + 1 : done + 4]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1), (3, 2)])
def test_a_stream_goes_on_with_another_number_of_workers(urls: list[str], before: int, after: int) -> None:
    straight = take(stream(urls), 13)
    for done in (3, 10):  # batch 11 spans two epochs
        position = take(stream(urls), done + 1, before)[-1]["position"]
        assert take(stream(urls, start=position), 2, after) == straight[done + 1 : done + 3]


def test_a_stream_goes_on_with_another_number_of_ranks(urls: list[str]) -> None:
    straight = take(stream(urls, batch_size=8), 8)
    position = take(stream(urls, batch_size=4, rank=1, world_size=2), 3)[-1]["position"]
    assert take(stream(urls, batch_size=8, start=position), 5) == straight[3:]


def test_a_stream_goes_on_with_another_global_batch(urls: list[str]) -> None:
    """The order is one of samples: what was seen stays seen, whatever the batches that it is cut into."""
    first = take(stream(urls, batch_size=7), 3)
    rest = take(stream(urls, batch_size=6, start=21), 4)
    assert sorted(keys(first) + keys(rest)) == EVERY


def test_resuming_decodes_nothing_again(urls: list[str]) -> None:
    decoded: list[str] = []

    def count(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        decoded.append(sample["__key__"])
        return keep(sample, rng)

    [batch] = take(stream(urls, decode=count, start=40), 1)
    assert sorted(decoded) == sorted(batch["keys"])


def test_a_validation_pass_is_ordered_and_complete(urls: list[str]) -> None:
    batches = take(stream(urls, shuffle=0, batch_size=10))
    assert keys(batches) == EVERY
    assert [len(batch["keys"]) for batch in batches] == [10, 10, 10, 10, 5]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_validation_pass_does_not_depend_on_the_workers(urls: list[str], workers: int) -> None:
    assert take(stream(urls, shuffle=0), workers=workers) == take(stream(urls, shuffle=0))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_out_a_validation_pass(urls: list[str], ranks: int) -> None:
    shares = [take(stream(urls, shuffle=0, batch_size=3, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert set(keys([batch for share in shares for batch in share])) == set(EVERY)
    assert len({len(share) for share in shares}) == 1  # no rank waits for another's batch


def test_every_rank_has_a_share_of_a_small_validation_set(urls: list[str]) -> None:
    shares = [take(stream(urls, shuffle=0, batch_size=32, rank=rank, world_size=4)) for rank in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]


def test_sources_are_mixed_in_batches(tmp_path: Path) -> None:
    sources = [Source([write_shard(tmp_path / f"{n}.tar", pairs(n, 20))]) for n in range(2)]
    orders = [Order([20], shuffle=8, source=n) for n in range(2)]
    mixed = ShardStream(sources, Mixture(orders, [3, 1]), decode=keep, collate=gather, batch_size=50)
    first = [key[0] for key in keys(take(mixed, 20))]
    assert first.count("0") == 750


# Damage


def sound(tmp_path: Path, count: int) -> str:
    """A shard of so many sound samples, and "0-03", a PNG that ends early."""
    samples = pairs(0, count + 1)
    samples[3]["png"] = samples[3]["png"][:45]
    return write_shard(tmp_path / "damaged.tar", samples)


def pixels(urls: list[str], **options: Any) -> ShardStream:
    return stream(urls, decode=Decode(8), collate=collate, **options)


def test_a_damaged_image_leaves_the_batch_size_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = sound(tmp_path, 7)
    [batch] = take(pixels([shard], batch_size=8), 1)
    assert batch["x"].shape == (8, 3, 8, 8)
    assert len(set(batch["keys"])) == 7
    assert batch["skipped"] == {"image": 1}
    assert f"skipping 0-03 of {shard}" in caplog.text


def test_a_damaged_image_is_left_out_of_a_validation_pass(tmp_path: Path) -> None:
    batches = take(pixels([sound(tmp_path, 7)], shuffle=0))
    assert [len(batch["keys"]) for batch in batches] == [3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_have_as_many_batches_of_a_damaged_validation_pass(tmp_path: Path, workers: int) -> None:
    """Sample 3 is rank 1's whole share of the second batch."""
    shard, options = sound(tmp_path, 5), {"shuffle": 0, "batch_size": 1, "world_size": 2}
    shares = [take(pixels([shard], rank=rank, **options), workers=workers) for rank in (0, 1)]
    seen = [[key.rpartition("/")[2] for key in keys(share)] for share in shares]
    assert seen == [["0-00", "0-02", "0-04"], ["0-01", "0-02", "0-05"]]
    assert [batch["skipped"].get("image", 0) for batch in shares[1]] == [0, 1, 0]


def test_a_pass_of_which_nothing_decodes_ends_where_ranks_share_it(urls: list[str]) -> None:
    assert take(stream(urls, shuffle=0, decode=refuse)) == []
    with pytest.raises(UserError, match="no sample of this data could be decoded"):
        take(stream(urls, shuffle=0, decode=refuse, rank=1, world_size=2))


def test_training_on_batches_of_one_survives_a_damaged_image(tmp_path: Path) -> None:
    batches = take(pixels([sound(tmp_path, 5)], batch_size=1), 12)
    assert [len(batch["keys"]) for batch in batches] == 12 * [1]
    assert sum(batch["skipped"].get("image", 0) for batch in batches) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_what_replaces_a_damaged_batch_depends_on_its_position_alone(tmp_path: Path, workers: int) -> None:
    shard = sound(tmp_path, 5)
    straight = [(batch["keys"], batch["position"]) for batch in take(pixels([shard], batch_size=1), 12)]
    for done in range(8):
        resumed = take(pixels([shard], batch_size=1, start=straight[done][1]), 3, workers)
        assert [(batch["keys"], batch["position"]) for batch in resumed] == straight[done + 1 : done + 4]


def test_a_shard_that_vanished_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = [write_shard(tmp_path / f"{n}.tar", pairs(n, 6)) for n in range(3)]
    stale = stream(shards, batch_size=3)
    Path(shards[1]).unlink()
    batches = take(stale, 6)
    assert {key[0] for key in keys(batches)} == {"0", "2"}
    assert sum(batch["skipped"].get("shard", 0) for batch in batches) == 6
    assert caplog.text.count("skipping shard") == 1


def test_a_shard_that_shrank_is_skipped_where_it_ends(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", pairs(0, 12))
    stale = stream([shard], batch_size=4)
    write_shard(tmp_path / "0.tar", pairs(0, 9))
    batches = take(stale, 3)
    assert sum(batch["skipped"].get("missing", 0) for batch in batches) == 3
    assert set(keys(batches)) <= {f"0-{i:02d}" for i in range(9)}


def test_nothing_left_is_a_user_error(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", pairs(0, 12))
    stale = stream([shard])
    Path(shard).unlink()
    with pytest.raises(UserError, match="in a row could be decoded"):
        take(stale, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_never_decode_are_a_user_error_of_one_sentence(urls: list[str], workers: int) -> None:
    with pytest.raises(UserError, match="in a row could be decoded") as caught:
        take(stream(urls, decode=refuse), 1, workers)
    assert "\n" not in str(caught.value)


def refuse(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    raise Skip("image", "not today")


def captions(urls: list[str], dropout: float, count: int) -> list[list[str]]:
    of = stream(urls, decode=Decode(8, caption_dropout=dropout), collate=collate, batch_size=8)
    return [batch["captions"] for batch in take(of, count)]


def test_captions_are_dropped_a_sample_at_a_time(urls: list[str]) -> None:
    empty = [batch.count("") for batch in captions(urls, 0.5, 24)]
    assert 0.4 < sum(empty) / (24 * 8) < 0.6
    assert sum(0 < count < 8 for count in empty) > 20


def test_the_same_captions_are_dropped_again(urls: list[str]) -> None:
    assert captions(urls, 0.5, 12) == captions(urls, 0.5, 12)


@pytest.mark.parametrize(("dropout", "dropped"), [(0.0, 0), (1.0, 48)])
def test_dropout_of_none_and_of_all(urls: list[str], dropout: float, dropped: int) -> None:
    assert sum(batch.count("") for batch in captions(urls, dropout, 6)) == dropped


# Batches of one shape


MIXED = [(40, 40), (40, 40), (64, 40), (40, 64), (40, 40), (120, 40)]  # (width, height)
SHAPES = [(16, 16), (16, 24), (24, 16), (8, 32)]  # (height, width)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """45 pictures of these shapes in turn, of which 23 are squares."""
    root, number, shards = tmp_path_factory.mktemp("mixed"), 0, []
    for shard, size in enumerate(SIZES):
        samples = pairs(shard, size)
        for sample in samples:
            sample["png"], number = png(MIXED[number % len(MIXED)]), number + 1
        shards.append(write_shard(root / f"{shard:03d}.tar", samples))
    return shards


def bucketed(urls: list[str], *, batch_size: int = 4, world_size: int = 1, **options: Any) -> ShardStream:
    source = Source(urls, measure=aspect)
    batch = batch_size * world_size
    order, _ = training_order([source.facts()], [1.0], SHAPES, batch=batch, seed=0, shuffle=16, lanes=3)
    options = {"decode": Decode(16, random_crop=True, flip=True), "collate": collate, **options}
    return ShardStream([source], order, batch_size=batch_size, world_size=world_size, **options)


def content(batches: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(batch["x"].numpy().tobytes(), batch["x"].shape, batch["keys"], batch["position"]) for batch in batches]


def test_bucketed_batches_are_of_one_shape_and_none_is_lost(mixed: list[str]) -> None:
    batches = take(bucketed(mixed, batch_size=1), 90)
    seen = Counter(key for batch in batches for key in batch["keys"])
    assert len(seen) == 45
    assert set(seen.values()) == {2}
    assert Counter(tuple(batch["x"].shape[2:]) for batch in batches) == {(16, 16): 46, (16, 24): 16, (24, 16): 14, (8, 32): 14}


@pytest.mark.parametrize("workers", [1, 3])
def test_bucketed_batches_do_not_depend_on_the_workers(mixed: list[str], workers: int) -> None:
    assert content(take(bucketed(mixed), 14, workers)) == content(take(bucketed(mixed), 14))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_same_bucketed_batches_at_one_shape(mixed: list[str], ranks: int) -> None:
    whole = take(bucketed(mixed, batch_size=8), 14)
    assert len({batch["x"].shape for batch in whole}) == 4
    shares = [take(bucketed(mixed, batch_size=8 // ranks, rank=rank, world_size=ranks), 14) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(keys(parts)) == sorted(batch["keys"])
        assert {(part["position"], part["x"].shape[2:]) for part in parts} == {(batch["position"], batch["x"].shape[2:])}


def test_a_bucketed_stream_goes_on_from_the_position_of_any_batch(mixed: list[str]) -> None:
    straight = take(bucketed(mixed), 26)
    for done in range(0, 24, 3):
        rest = take(bucketed(mixed, start=straight[done]["position"]), 2)
        assert content(rest) == content(straight[done + 1 : done + 3])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_bucketed_validation_pass_is_complete_and_of_one_shape_a_batch(mixed: list[str], ranks: int, workers: int) -> None:
    source = Source(mixed, measure=aspect)
    order = validation_order(source.facts(), SHAPES)
    options = {"batch_size": 4, "stop": order.size, "cuts": order.cuts, "decode": Decode(16), "collate": collate}
    shares = [
        take(ShardStream([source], order, rank=rank, world_size=ranks, **options), workers=workers) for rank in range(ranks)
    ]
    seen = keys([batch for share in shares for batch in share])
    assert set(key.rpartition("/")[2] for key in seen) == set(EVERY)
    assert len(seen) == (45 if ranks == 1 else len(seen))
    for parts in zip(*shares, strict=True):
        assert len({part["x"].shape[2:] for part in parts}) == 1
    assert sum(-(-size // (4 * ranks)) for size in (23, 8, 7, 7)) == len(shares[0])


def test_what_replaces_a_damaged_batch_is_of_its_shape(tmp_path: Path) -> None:
    """The only tall pictures are broken behind their first bytes: others take their place, cropped tall."""
    samples = pairs(0, 30)
    for number in (3, 17):
        samples[number]["png"] = png((16, 24))[:45]
    shard = write_shard(tmp_path / "a.tar", samples)
    batches = take(bucketed([shard], batch_size=2), 15)
    tall = [batch for batch in batches if batch["skipped"]]
    assert [tuple(batch["x"].shape) for batch in tall] == [(2, 3, 24, 16)]
    assert sum(batch["x"].shape[2] == 24 for batch in batches) == 1


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write_shard(tmp_path / f"{n:03d}.tar", pairs(n, 1)) for n in range(60)]
    before = len(os.listdir("/dev/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 24, hard))
    try:
        batches = take(stream(shards), 45)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not any(batch["skipped"] for batch in batches)
    assert len(set(keys(batches))) == 60


def test_shards_are_closed_where_too_many_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write_shard(tmp_path / f"{n:03d}.tar", pairs(n, 1)) for n in range(9)]
    whole = stream(shards)
    opened: list[Shard] = []

    def few(*args: Any, **options: Any) -> Shard:
        if sum(not shard.file.closed for shard in opened) >= 2:
            raise OSError(errno.EMFILE, "too many open files")
        opened.append(Shard(*args, **options))
        return opened[-1]

    monkeypatch.setattr("lcm.data.source.Shard", few)
    batches = take(whole, 9)
    assert not any(batch["skipped"] for batch in batches)


def test_a_handle_that_a_file_server_lost_is_opened_again(urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stream(urls)
    batches = iter(whole)
    first = [next(batches) for _ in range(3)]
    for shard in whole.reader.shards.values():
        monkeypatch.setattr(shard, "_read", lambda *args: os.pread(-1, 1, 0))
    assert [*first, *(next(batches) for _ in range(6))] == take(stream(urls), 9)
