"""Batches have one order for any number of workers and ranks, from any position, and with damaged samples."""

import copy
import itertools
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcm.core.errors import UserError
from lcm.data.buckets import aspect
from lcm.data.order import BucketOrder, Order
from lcm.data.sample_fields import Skip
from lcm.data.source import Source
from lcm.data.stream import PassStream, Stream, TrainStream
from lcm.data.tar import LocalFile
from lcm.data.transforms import Decode, collate
from tests.data.conftest import SIZES, keep, keys, pairs, png, stream, take, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
EVERY = [f"{shard}-{i:02d}" for shard, size in enumerate(SIZES) for i in range(size)]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return 8 shards of 12 samples: lanes of equal length."""
    root = tmp_path_factory.mktemp("even")
    return [write_shard(root / f"{n}.tar", pairs(n, 12)) for n in range(8)]


def shards_of(batches: list[dict[str, Any]]) -> set[str]:
    return {key.partition("-")[0] for key in keys(batches)}


# Training


@pytest.mark.parametrize(("workers", "context"), [(3, "fork"), (2, "spawn")])
def test_order_and_draws_do_not_depend_on_workers(urls: list[str], workers: int, context: str) -> None:
    assert take(stream(urls), 14, workers, context) == take(stream(urls), 14)


def in_turns(whole: Stream, count: int | None, workers: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the batches of a DataLoader with this number of workers. Do not start processes."""
    turns = []
    for number in range(max(workers, 1)):
        info = SimpleNamespace(id=number, num_workers=workers) if workers else None
        worker_batches = iter(copy.deepcopy(whole))
        with patch.context() as patched:
            patched.setattr("lcm.data.stream.get_worker_info", lambda info=info: info)
            first = list(itertools.islice(worker_batches, 1))  # a worker learns its number with its first batch
        turns.append(itertools.chain(first, worker_batches))
    batches = (next(turn, None) for turn in itertools.cycle(turns))
    return list(itertools.islice(itertools.takewhile(bool, batches), count))


def test_every_sample_once_an_epoch_over_ranks_and_workers(
    even: list[str], urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, workers = 3, 3
    shares = [stream(even, batch_size=4, lanes=4, rank=rank, world_size=ranks) for rank in range(ranks)]
    seen = Counter(key for share in shares for key in keys(in_turns(share, 24, workers, monkeypatch)))
    assert set(seen.values()) == {ranks}  # 3 ranks x 24 batches x 4 samples are 3 epochs of 96 samples
    assert len(seen) == 96

    shares = [stream(urls, batch_size=3, shuffle=0, rank=rank, world_size=ranks) for rank in range(ranks)]
    seen = Counter(key for share in shares for key in keys(in_turns(share, None, workers, monkeypatch)))
    assert set(seen) == set(EVERY)
    assert seen.total() - len(EVERY) < ranks  # a rank without a sample in the last batch repeats a sample


def test_workers_in_turns_are_those_of_a_loader(urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_turns(stream(urls), 14, 3, monkeypatch) == take(stream(urls), 14, 3)
    assert in_turns(stream(urls, shuffle=0), None, 2, monkeypatch) == take(stream(urls, shuffle=0), None, 2)


# Resume


def test_stream_resumes_from_the_position_of_any_batch(urls: list[str]) -> None:
    straight = take(stream(urls, batch_size=5), 28)
    for done in range(25):
        assert take(stream(urls, batch_size=5, start=straight[done]["position"]), 3) == straight[done + 1 : done + 4]


@pytest.mark.parametrize(("workers", "ranks", "lost"), [(2, 1, False), (0, 2, True), (1, 4, False)])
def test_resume_with_other_workers_and_ranks(even: list[str], tmp_path: Path, workers: int, ranks: int, lost: bool) -> None:
    straight = take(stream(Source(even, index=str(tmp_path)), batch_size=8, lanes=4), 30)
    for done in (2, 11, 25):  # batches of the first, the first and the third epoch
        index = tmp_path / f"{done}" if lost else tmp_path
        options = {"batch_size": 8 // ranks, "lanes": 4, "start": straight[done]["position"], "world_size": ranks}
        shares = [take(stream(Source(even, index=str(index)), rank=rank, **options), 3, workers) for rank in range(ranks)]
        assert [keys(parts) for parts in zip(*shares, strict=True)] == [
            batch["keys"] for batch in straight[done + 1 : done + 4]
        ]


def test_stream_resumes_with_another_global_batch(even: list[str]) -> None:
    """The order is an order of samples, not of batches. No sample repeats after a change of the batch size."""
    first = take(stream(even, lanes=4, batch_size=12), 4)
    rest = take(stream(even, lanes=4, batch_size=8, start=48), 6)
    assert len(set(keys(first) + keys(rest))) == 96


def test_resume_decodes_nothing_again(urls: list[str]) -> None:
    decoded: list[str] = []

    def count(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        decoded.append(sample["__key__"])
        return keep(sample, rng)

    [batch] = take(stream(urls, decode=count, start=40), 1)
    assert sorted(decoded) == sorted(batch["keys"])


# Start


@pytest.mark.parametrize("resumed", [False, True])
def test_first_batch_opens_the_shards_of_its_samples_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """A run that resumes with the indexes of an earlier run opens no other shards either."""
    urls = [write_shard(tmp_path / f"{n:02d}.tar", pairs(n, 20)) for n in range(40)]
    if resumed:
        source = Source(urls, index=str(tmp_path / "index"))
        for shard in range(40):
            source.notes(shard)
    opened: list[str] = []
    start = LocalFile.__init__
    monkeypatch.setattr(LocalFile, "__init__", lambda file, path: opened.append(path) or start(file, path))
    source = Source(urls, index=str(tmp_path / "index"))
    [batch] = take(stream(source, batch_size=8, lanes=4, start=168 if resumed else 0), 1)
    assert {Path(path).stem.lstrip("0") or "0" for path in opened} == shards_of([batch])
    assert len(set(opened)) == 4


def test_first_batch_reads_the_first_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = png((8, 8)) + bytes(200_000)
    samples = [{**sample, "png": big} for sample in pairs(0, 200)]
    urls = [write_shard(tmp_path / f"{n}.tar", samples) for n in range(3)]
    read: list[int] = []
    plain = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda file, start, size: read.append(size) or plain(file, start, size))
    take(stream(urls, batch_size=6, lanes=3), 1)
    assert sum(read) < 8_000_000  # six samples, and headers
    assert max(read) < 210_000


# Passes


def test_pass_is_ordered_and_complete(urls: list[str]) -> None:
    batches = take(stream(urls, shuffle=0, batch_size=10))
    assert keys(batches) == EVERY
    assert [len(batch["keys"]) for batch in batches] == [10, 10, 10, 10, 5]


def test_ranks_share_out_a_pass(urls: list[str]) -> None:
    ranks, batch = 4, 32
    shares = [take(stream(urls, shuffle=0, batch_size=batch, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert set(keys([batch for share in shares for batch in share])) == set(EVERY)
    assert len({len(share) for share in shares}) == 1  # no rank waits for another's batch
    assert all(batch["keys"] for share in shares for batch in share)


def test_pass_by_shard_draws_alike_whatever_the_other_shards(urls: list[str]) -> None:
    source = Source(urls)
    whole = take(stream(source, shuffle=0, by_shard=True), workers=2)
    assert keys(whole) == EVERY
    assert [batch["shard"] for batch in whole] == sorted(batch["shard"] for batch in whole)
    rest = take(stream(source.subset([1, 3]), shuffle=0, by_shard=True))
    assert [batch["draws"] for batch in rest] == [batch["draws"] for batch in whole if batch["shard"] in (1, 3)]
    again = stream(source, shuffle=0, by_shard=True)
    assert take(again) == take(again) == take(stream(source, shuffle=0, by_shard=True))


# Damage


def sound(tmp_path: Path, count: int) -> str:
    """Write a shard of `count` sound samples and the damaged sample "0-03". The PNG of "0-03" ends early."""
    samples = pairs(0, count + 1)
    samples[3]["png"] = samples[3]["png"][:45]
    return write_shard(tmp_path / "damaged.tar", samples)


def pixels(urls: list[str], **options: Any) -> Stream:
    return stream(urls, decode=Decode(8), collate=collate, **options)


def test_damaged_image_leaves_the_batch_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = sound(tmp_path, 7)
    [batch] = take(pixels([shard], batch_size=8), 1)
    assert batch["x"].shape == (8, 3, 8, 8)
    assert len(set(batch["keys"])) == 7
    assert batch["skipped"] == {"image": 1}
    assert f"skipping 0-03 of {shard}" in caplog.text


def test_ranks_have_as_many_batches_of_a_damaged_pass(tmp_path: Path) -> None:
    """Sample 3 is rank 1's whole share of the second batch."""
    shard, options = sound(tmp_path, 5), {"shuffle": 0, "batch_size": 1, "world_size": 2}
    shares = [take(pixels([shard], rank=rank, **options), workers=2) for rank in (0, 1)]
    seen = [[key.rpartition("/")[2] for key in keys(share)] for share in shares]
    assert seen == [["0-00", "0-02", "0-04"], ["0-01", "0-02", "0-05"]]
    assert [batch["skipped"].get("image", 0) for batch in shares[1]] == [0, 1, 0]


def test_pass_without_sound_samples_ends(urls: list[str]) -> None:
    assert take(stream(urls, shuffle=0, decode=refuse)) == []
    with pytest.raises(UserError, match="no sample of this data could be decoded"):
        take(stream(urls, shuffle=0, decode=refuse, rank=1, world_size=2))


def test_stand_ins_depend_on_the_position_alone(tmp_path: Path) -> None:
    shard = sound(tmp_path, 5)
    straight = [(batch["keys"], batch["position"]) for batch in take(pixels([shard], batch_size=1), 12)]
    for done in range(8):
        resumed = take(pixels([shard], batch_size=1, start=straight[done][1]), 3, workers=2)
        assert [(batch["keys"], batch["position"]) for batch in resumed] == straight[done + 1 : done + 4]


@pytest.mark.parametrize("rewritten", [True, False], ids=["shrank", "removed"])
def test_shard_that_changes_meanwhile_costs_its_samples_only(tmp_path: Path, rewritten: bool) -> None:
    shards = [write_shard(tmp_path / f"{n}.tar", pairs(n, 12)) for n in range(2)]
    source = Source(shards)
    assert [source.notes(shard).samples for shard in (0, 1)] == [12, 12]
    Path(shards[0]).unlink()
    if rewritten:
        write_shard(tmp_path / "0.tar", pairs(0, 9))
    batches = take(stream(source, batch_size=4, lanes=2), 6)
    lost = sum(sum(batch["skipped"].values()) for batch in batches)
    assert lost == (3 if rewritten else 12)
    assert {key for key in keys(batches) if key[0] == "1"} == {f"1-{i:02d}" for i in range(12)}


def test_samples_that_never_decode_are_a_user_error_of_one_sentence(urls: list[str]) -> None:
    with pytest.raises(UserError, match="in a row could be decoded") as caught:
        take(stream(urls, decode=refuse), 1, workers=1)
    assert "\n" not in str(caught.value)


def refuse(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    raise Skip("image", "not today")


def captions(urls: list[str], dropout: float, count: int) -> list[list[str]]:
    whole = stream(urls, decode=Decode(8, caption_dropout=dropout), collate=collate, batch_size=8)
    return [batch["captions"] for batch in take(whole, count)]


def test_captions_are_dropped_a_sample_at_a_time(urls: list[str]) -> None:
    empty = [batch.count("") for batch in captions(urls, 0.5, 24)]
    assert 0.4 < sum(empty) / (24 * 8) < 0.6
    assert sum(0 < count < 8 for count in empty) > 20


# Batches of one shape


MIXED = [(40, 40), (40, 40), (64, 40), (40, 64), (40, 40), (120, 40)]  # (width, height)
SHAPES = [(16, 16), (16, 24), (24, 16), (8, 32)]  # (height, width)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return shards of 45 pictures with the shapes of `MIXED` in turn. 23 of the pictures are squares."""
    root, number, shards = tmp_path_factory.mktemp("mixed"), 0, []
    for shard, size in enumerate(SIZES):
        samples = pairs(shard, size)
        for sample in samples:
            sample["png"], number = png(MIXED[number % len(MIXED)]), number + 1
        shards.append(write_shard(root / f"{shard:03d}.tar", samples))
    return shards


def bucketed(urls: list[str], *, batch_size: int = 4, world_size: int = 1, **options: Any) -> TrainStream:
    source = Source(urls, aspect=aspect)
    order = BucketOrder(Order([source], [1.0], shuffle=16, lanes=3), SHAPES, batch_size=batch_size * world_size)
    options = {"decode": Decode(16, random_crop=True, flip=True), "collate": collate, **options}
    return TrainStream([source], order, batch_size=batch_size, world_size=world_size, **options)


def content(batches: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(batch["x"].numpy().tobytes(), batch["x"].shape, batch["keys"], batch["position"]) for batch in batches]


def test_bucketed_batches_have_one_shape_and_none_is_lost(mixed: list[str]) -> None:
    batches = take(bucketed(mixed, batch_size=1), 96)
    assert set(key.rpartition("/")[2] for key in keys(batches)) == set(EVERY)
    shapes = Counter(tuple(batch["x"].shape[2:]) for batch in batches)
    assert {shape: count / 96 for shape, count in shapes.items()} == {
        (16, 16): pytest.approx(23 / 45, abs=0.1),
        **{shape: pytest.approx(22 / 3 / 45, abs=0.1) for shape in SHAPES[1:]},
    }


def test_ranks_share_out_the_same_bucketed_batches_at_one_shape(mixed: list[str]) -> None:
    ranks = 4
    whole = take(bucketed(mixed, batch_size=8), 14)
    assert len({batch["x"].shape for batch in whole}) == 4
    shares = [take(bucketed(mixed, batch_size=8 // ranks, rank=rank, world_size=ranks), 14) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(keys(parts)) == sorted(batch["keys"])
        assert {(part["position"], part["x"].shape[2:]) for part in parts} == {(batch["position"], batch["x"].shape[2:])}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (3, 0)])
def test_bucketed_pass_is_complete_and_of_one_shape_a_batch(mixed: list[str], ranks: int, workers: int) -> None:
    source = Source(mixed, aspect=aspect)
    options = {"batch_size": 4, "shapes": SHAPES, "decode": Decode(16), "collate": collate, "world_size": ranks}
    shares = [take(PassStream(source, rank=rank, **options), workers=workers) for rank in range(ranks)]
    seen = keys([batch for share in shares for batch in share])
    assert set(key.rpartition("/")[2] for key in seen) == set(EVERY)
    assert ranks > 1 or len(seen) == 45
    for parts in zip(*shares, strict=True):
        assert len({part["x"].shape[2:] for part in parts}) == 1


def test_stand_ins_have_the_shape_of_their_batch(tmp_path: Path) -> None:
    """The only tall pictures are damaged after their first bytes. Other pictures, cropped to the tall shape, replace them."""
    samples = pairs(0, 30)
    for number in (3, 17):
        samples[number]["png"] = png((16, 24))[:45]
    shard = write_shard(tmp_path / "a.tar", samples)
    batches = take(bucketed([shard], batch_size=2), 32)
    broken = [batch for batch in batches if batch["skipped"].get("image") == 2]
    assert {tuple(batch["x"].shape) for batch in broken} == {(2, 3, 24, 16)}
    assert {len(batch["keys"]) for batch in batches} == {2}
