"""The order of samples, resuming in it, and what damaged shards and samples do to a stream."""

import io
import logging
import random
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from lcm.data.shards import Cursor, ShardStream, check_shards, expand_urls, read_samples
from lcm.data.transforms import Decode, collate
from lcm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIZES = (11, 12, 13, 9)  # 45 samples in 4 shards: no batch size below divides an epoch


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> str:
    with wds.TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def pairs(shard: int, count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"{shard}-{i:02d}", "png": png(), "txt": f"sample {i} of {shard}"} for i in range(count)]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("shards")
    return [write_shard(root / f"{shard:03d}.tar", pairs(shard, count)) for shard, count in enumerate(SIZES)]


def keep(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {"key": sample["__key__"], "draw": rng.random()}


def gather(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"keys": [sample["key"] for sample in samples], "draws": [sample["draw"] for sample in samples]}


def stream(urls: list[str], **options: Any) -> ShardStream:
    return ShardStream(urls, **{"decode": keep, "collate": gather, "batch_size": 4, "shuffle": 16, **options})


def take(source: ShardStream, count: int | None = None, workers: int = 0) -> list[dict[str, Any]]:
    return list(islice(DataLoader(source, batch_size=None, num_workers=workers), count))


def keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def test_braces_expand_in_order(urls: list[str]) -> None:
    assert expand_urls(str(Path(urls[0]).with_name("{000..003}.tar"))) == urls


def test_globs_expand_sorted(urls: list[str]) -> None:
    assert expand_urls(str(Path(urls[0]).with_name("*.tar"))) == urls


def test_lists_of_patterns_are_concatenated(urls: list[str]) -> None:
    assert expand_urls([urls[3], str(Path(urls[0]).with_name("00[01].tar"))]) == [urls[3], urls[0], urls[1]]


def test_remote_braces_expand_without_a_look_at_the_remote() -> None:
    assert expand_urls("s3://bucket/{08..10}.tar") == [f"s3://bucket/{n}.tar" for n in ("08", "09", "10")]


@pytest.mark.parametrize("pattern", ["nowhere.tar", "no*.tar", "{000..004}.tar"])
def test_missing_shards_are_a_user_error_that_names_the_option(urls: list[str], pattern: str) -> None:
    with pytest.raises(UserError, match=r"no shards match .*data\.val_shards"):
        expand_urls(str(Path(urls[0]).with_name(pattern)), "data.val_shards")


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"png": png()}, "no captions"),
        ({"txt": "a cat"}, "no images"),
        ({"json": {"caption": "a cat"}, "npy": b""}, "no images"),
    ],
)
def test_shards_lacking_images_or_captions_are_refused(tmp_path: Path, members: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_shards([write_shard(tmp_path / "a.tar", [{"__key__": "a", **members}])])


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(10240)], ids=["empty", "html", "no members"])
def test_what_is_not_a_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable webdataset shard"):
        check_shards([str(path)])


@pytest.mark.parametrize("url", ["nosuch://bucket/a.tar", "dropbox://a.tar"])
def test_protocols_that_cannot_be_opened_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        check_shards([url])


def test_sound_shards_are_accepted(urls: list[str]) -> None:
    check_shards(urls)


def test_the_order_is_a_pure_function_of_seed_and_epoch(urls: list[str]) -> None:
    orders = [[s["__key__"] for s in stream(urls, seed=seed).epoch(epoch)] for seed, epoch in [(3, 1), (3, 1), (4, 1), (3, 2)]]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


@pytest.mark.parametrize("shuffle", [1, 16, 2048])
def test_an_epoch_holds_every_sample_once(urls: list[str], shuffle: int) -> None:
    order = [sample["__key__"] for sample in stream(urls, shuffle=shuffle).epoch(0)]
    assert sorted(order) == sorted(sample["__key__"] for sample in read_samples(urls))
    assert len(order) == sum(SIZES)


def test_epochs_follow_each_other_without_loss(urls: list[str]) -> None:
    assert sorted(keys(take(stream(urls, batch_size=5), 27))) == sorted(3 * [s["__key__"] for s in read_samples(urls)])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_order_and_the_draws_do_not_depend_on_the_workers(urls: list[str], workers: int) -> None:
    assert take(stream(urls), 14, workers) == take(stream(urls), 14)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_same_global_batches(urls: list[str], ranks: int) -> None:
    whole = take(stream(urls, batch_size=8), 14)
    shares = [take(stream(urls, batch_size=8 // ranks, rank=rank, world_size=ranks), 14) for rank in range(ranks)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(keys(parts)) == sorted(batch["keys"])
        assert {part["cursor"] for part in parts} == {batch["cursor"]}


def test_a_stream_goes_on_from_the_cursor_of_any_batch(urls: list[str]) -> None:
    """Three epochs of 45 samples, so that some batches hold samples of two epochs and one ends with an epoch."""
    straight = take(stream(urls, batch_size=5), 28)
    for done in range(25):
        assert take(stream(urls, batch_size=5, start=straight[done]["cursor"]), 3) == straight[done + 1 : done + 4]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1), (3, 2)])
def test_a_stream_goes_on_with_another_number_of_workers(urls: list[str], before: int, after: int) -> None:
    straight = take(stream(urls), 13)
    for done in (3, 10):  # batch 11 spans two epochs
        cursor = take(stream(urls), done + 1, before)[-1]["cursor"]
        assert take(stream(urls, start=cursor), 2, after) == straight[done + 1 : done + 3]


def test_a_stream_goes_on_with_another_number_of_ranks(urls: list[str]) -> None:
    straight = take(stream(urls, batch_size=8), 8)
    cursor = take(stream(urls, batch_size=4, rank=1, world_size=2), 3)[-1]["cursor"]
    assert take(stream(urls, batch_size=8, start=cursor), 5) == straight[3:]


def test_without_shuffling_a_stream_is_one_ordered_pass_with_a_partial_last_batch(urls: list[str]) -> None:
    batches = take(stream(urls, shuffle=0, batch_size=10))
    assert keys(batches) == [sample["__key__"] for sample in read_samples(urls)]
    assert [len(batch["keys"]) for batch in batches] == [10, 10, 10, 10, 5]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_validation_pass_does_not_depend_on_the_workers(urls: list[str], workers: int) -> None:
    assert take(stream(urls, shuffle=0), workers=workers) == take(stream(urls, shuffle=0))


def test_ranks_share_out_a_validation_pass(urls: list[str]) -> None:
    shares = [take(stream(urls, shuffle=0, batch_size=6, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(keys(shares[0] + shares[1])) == [sample["__key__"] for sample in read_samples(urls)]


def test_every_rank_has_a_share_of_a_small_validation_set(urls: list[str]) -> None:
    shares = [take(stream(urls, shuffle=0, batch_size=32, rank=rank, world_size=4)) for rank in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]


def damaged(tmp_path: Path, *, sound: int) -> str:
    """A shard whose sample "0-03" is a PNG that ends early."""
    samples = pairs(0, sound + 1)
    samples[3]["png"] = samples[3]["png"][:45]
    return write_shard(tmp_path / "damaged.tar", samples)


def test_a_damaged_image_leaves_the_batch_size_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = damaged(tmp_path, sound=7)
    [batch] = take(ShardStream([shard], decode=Decode(8), collate=collate, batch_size=8, shuffle=8), 1)
    assert batch["x"].shape == (8, 3, 8, 8)
    assert len(set(batch["keys"])) == 7
    assert f"skipping 0-03 of {shard}" in caplog.text


def test_a_damaged_image_is_left_out_of_a_validation_pass(tmp_path: Path) -> None:
    batches = take(ShardStream([damaged(tmp_path, sound=7)], decode=Decode(8), collate=collate, batch_size=4, shuffle=0))
    assert [len(batch["keys"]) for batch in batches] == [3, 4]


def test_training_on_batches_of_one_survives_a_damaged_image(tmp_path: Path) -> None:
    batches = take(ShardStream([damaged(tmp_path, sound=5)], decode=Decode(8), collate=collate, batch_size=1, shuffle=8), 12)
    assert [len(batch["keys"]) for batch in batches] == 12 * [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_replaces_a_damaged_batch_depends_on_its_position_alone(tmp_path: Path, workers: int) -> None:
    def single(**options: Any) -> ShardStream:
        return ShardStream([shard], decode=Decode(8), collate=collate, batch_size=1, shuffle=8, **options)

    shard = damaged(tmp_path, sound=5)
    straight = [(batch["keys"], batch["cursor"]) for batch in take(single(), 12)]
    for done in range(8):
        resumed = take(single(start=straight[done][1]), 3, workers)
        assert [(batch["keys"], batch["cursor"]) for batch in resumed] == straight[done + 1 : done + 4]


def test_no_image_counts_twice_in_a_validation_pass(tmp_path: Path) -> None:
    batches = take(ShardStream([damaged(tmp_path, sound=5)], decode=Decode(8), collate=collate, batch_size=1, shuffle=0))
    assert len(keys(batches)) == len(set(keys(batches))) == 5


def test_shards_without_a_usable_sample_are_a_user_error(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"__key__": "a", "png": png()}])
    with pytest.raises(UserError, match="no usable sample"):
        take(stream([shard]), 1)


def test_an_error_in_a_worker_stays_one_sentence(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"__key__": "a", "png": png()}])
    with pytest.raises(UserError) as caught:
        take(stream([shard]), 1, workers=1)
    assert "\n" not in str(caught.value)


def test_samples_without_a_caption_are_passed_over(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [*pairs(0, 2), {"__key__": "0-02", "png": png()}])
    assert keys(take(stream([shard], shuffle=0))) == ["0-00", "0-01"]


@pytest.mark.parametrize("member", ["1-06.png", "1-06.txt"])
@pytest.mark.parametrize("part", ["header", "content"])
def test_of_a_cut_shard_only_the_rest_is_lost(
    tmp_path: Path, urls: list[str], member: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(urls[1]) as tar:
        info = tar.getmember(member)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(urls[1]).read_bytes()[: info.offset + 100 if part == "header" else info.offset_data + info.size // 2])
    read = [sample["__key__"] for sample in read_samples([urls[0], str(cut), urls[2]])]
    before, middle, after = ([s["__key__"] for s in read_samples([url])] for url in urls[:3])
    kept = len(read) - len(before) - len(after)
    assert read == before + middle[:kept] + after
    assert kept in (5, 6)  # a sample is known to be whole when the next begins
    assert part == "header" or f"skipping the rest of shard {cut}" in caplog.text


def test_a_missing_shard_is_passed_over_with_a_warning(urls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(read_samples([urls[0], urls[1] + ".gone", urls[2]]))) == SIZES[0] + SIZES[2]
    assert "skipping the rest of shard" in caplog.text


def captions(urls: list[str], dropout: float, count: int) -> list[list[str]]:
    decode = Decode(8, caption_dropout=dropout)
    return [
        batch["captions"] for batch in take(ShardStream(urls, decode=decode, collate=collate, batch_size=8, shuffle=64), count)
    ]


def test_captions_are_dropped_a_sample_at_a_time(urls: list[str]) -> None:
    empty = [batch.count("") for batch in captions(urls, 0.5, 24)]
    assert 0.4 < sum(empty) / (24 * 8) < 0.6
    assert sum(0 < count < 8 for count in empty) > 20


def test_the_same_captions_are_dropped_again(urls: list[str]) -> None:
    assert captions(urls, 0.5, 12) == captions(urls, 0.5, 12)


@pytest.mark.parametrize(("dropout", "dropped"), [(0.0, 0), (1.0, 48)])
def test_dropout_of_none_and_of_all(urls: list[str], dropout: float, dropped: int) -> None:
    assert sum(batch.count("") for batch in captions(urls, dropout, 6)) == dropped


@pytest.mark.parametrize("url", ["pipe:touch {}", "pipe:touch {} file://x.tar", "pipe:touch {}; echo ://"])
def test_pipe_urls_run_nothing(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    marker = tmp_path / "ran"
    with pytest.raises(UserError):
        check_shards(expand_urls(url.format(marker)))
    assert list(read_samples([url.format(marker)])) == []
    assert not marker.exists()


def test_cursors_count_samples_of_all_ranks(urls: list[str]) -> None:
    assert take(stream(urls, batch_size=4, world_size=2), 1)[0]["cursor"] == Cursor(0, 8)
