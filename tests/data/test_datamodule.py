"""The DataModule's errors, and the batches that move its position."""

import importlib
import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.filters import Filters
from lcm.data.source import Source
from lcm.data.workers import init_worker, kill, workers_watched
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec
from lcm.runtime import signals
from tests.data.conftest import pairs, png, write_shard, write_tar


@pytest.fixture(scope="module")
def codec(tiny_pipeline: Path) -> LatentCodec:
    return load_codec(str(tiny_pipeline))


def datamodule(shards: Path, **options: Any) -> ShardDataModule:
    options = {"val_shards": f"{shards}/val-*.tar", "resolution": 32, "batch_size": 8, "num_workers": 0, **options}
    data = ShardDataModule(f"{shards}/train-*.tar", **options)
    data.prepare_data()
    data.setup("fit")
    return data


def consume(data: ShardDataModule, batch: dict[str, Any], *, training: bool) -> Any:
    """Return a batch as Lightning passes it to a step."""
    data.trainer = SimpleNamespace(training=training, global_rank=0, world_size=1, loggers=[], global_step=3)
    return data.on_after_batch_transfer(batch, 0)


def test_resolution_off_the_vaes_grid_is_a_user_error(shards: Path, codec: LatentCodec) -> None:
    with pytest.raises(UserError, match=r"data\.resolution=30 is not a multiple of the VAE's factor 4"):
        datamodule(shards, codec=codec, resolution=30)


@pytest.mark.parametrize("option", ["random_crop", "flip"])
def test_codec_cache_refuses_random_transforms(tiny_pipeline: Path, shards: Path, option: str) -> None:
    with pytest.raises(UserError, match="cache"):
        datamodule(shards, codec=load_codec(str(tiny_pipeline), cache=True), **{option: True})


def test_without_a_codec_batches_are_pixels(shards: Path) -> None:
    data = datamodule(shards)
    x = consume(data, next(iter(data.train_dataloader())), training=True)["x"]
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)


def test_the_same_batch_encodes_alike_and_another_differently(shards: Path, codec: LatentCodec) -> None:
    data = datamodule(shards, codec=codec)
    batch = next(iter(data.train_dataloader()))
    first = consume(data, batch, training=True).z0
    assert torch.equal(consume(data, batch, training=True).z0, first)
    assert not torch.equal(consume(data, {**batch, "position": 9}, training=True).z0, first)


def test_only_training_batches_move_the_position(shards: Path, codec: LatentCodec) -> None:
    data = datamodule(shards, codec=codec)
    train = iter(data.train_dataloader())
    consume(data, next(train), training=True)
    consume(data, next(train), training=True)
    assert data.state_dict()["position"] == 16
    for batch in data.val_dataloader():
        consume(data, batch, training=False)
    assert data.state_dict()["position"] == 16


def steps(shards: Path, ranks: int, count: int, state: dict[str, Any] | None = None) -> tuple[list[list[str]], dict[str, Any]]:
    """Return the samples of all ranks in each of `count` steps, and the state of rank 0 afterwards."""
    taken, states = [], []
    for rank in range(ranks):
        data = datamodule(shards, batch_size=8 // ranks, val_shards=None)
        if state is not None:
            data.load_state_dict(state)
        data.trainer = SimpleNamespace(training=True, global_rank=rank, world_size=ranks, loggers=[], global_step=0)
        batches = [
            data.on_after_batch_transfer(batch, 0) for batch, _ in zip(data.train_dataloader(), range(count), strict=False)
        ]
        taken.append([batch["keys"] for batch in batches])
        states.append(data.state_dict())
    return [sorted(itertools.chain(*parts)) for parts in zip(*taken, strict=True)], states[0]


@pytest.mark.parametrize(("before", "after", "done"), [(1, 4, 1), (2, 8, 30)])  # 30 is in the second epoch
def test_resume_with_other_ranks_at_one_global_batch(shards: Path, before: int, after: int, done: int) -> None:
    straight, _ = steps(shards, 1, done + 3)
    first, state = steps(shards, before, done)
    rest, _ = steps(shards, after, 3, state)
    assert first + rest == straight


def test_validation_is_whole_and_without_dropout(shards: Path) -> None:
    data = datamodule(shards, caption_dropout=1.0, val_batch_size=3)
    batches = list(data.val_dataloader())
    names = [caption for batch in batches for caption in batch["captions"]]
    assert all(names)
    assert len(set(names)) == len(names) > 3
    assert {len(batch["keys"]) for batch in batches[:-1]} == {3}


def test_dataset_is_built_before_its_shards_are_read(shards: Path) -> None:
    calls: list[bool] = []
    datamodule(shards, build=lambda: calls.append(True))
    assert calls == [True]


def test_checkpoint_of_other_data_starts_the_order_anew(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = datamodule(shards)
    data.load_state_dict({"position": 40, "data": "another", "skips": {"seen": 40, "by_reason": {}}})
    assert data.position == 0
    assert "the order of the training data starts anew" in caplog.text


@pytest.mark.parametrize("options", [{"sources": [{"urls": "a.tar", "weight": 1}]}, {"shards": None}])
def test_training_data_is_given_once(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.shards=.*data\.folder=.*data\.sources="):
        ShardDataModule(**{"shards": "b.tar", **options})


def test_sources_are_mixed_by_weight(shards: Path) -> None:
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    data = ShardDataModule(
        sources=[{"urls": urls[0], "weight": 3}, {"urls": urls[1:], "weight": 1}], resolution=32, batch_size=100, num_workers=0
    )
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(10), strict=False)]
    assert sum(key.startswith(urls[0]) for batch in batches for key in batch["keys"]) == 750


def test_left_out_samples_reach_the_metrics(shards: Path) -> None:
    data, logged = datamodule(shards, filters=Filters(max_caption=35), num_workers=1, val_shards=None), []
    # The workers do not report the scan of another source in this process.
    assert Source([str(shards / "train-00000.tar")], filters=Filters(max_caption=1)).left_out()
    data.trainer = SimpleNamespace(training=True, global_rank=0, world_size=1, loggers=[], global_step=3)
    data.trainer.loggers = [SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))]
    for number, batch in enumerate(data.train_dataloader()):
        data.on_after_batch_transfer(batch, 0)
        if (logged and number >= 30) or number > 10_000:  # the worker's report comes a little later
            break
    assert logged[-1].keys() == {"data/left_out/caption_long"}
    [source] = data.train_sources
    assert logged[-1]["data/left_out/caption_long"] == source.left_out()["caption_long"]


def test_folder_of_pictures_is_streamed_and_resumed(tmp_path: Path) -> None:
    for number in range(70):
        (tmp_path / f"{number}.png").write_bytes(png((40, 40)))
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    data, restored = (ShardDataModule(folder=str(tmp_path), resolution=32, batch_size=7, num_workers=0) for _ in range(2))
    for module in (data, restored):
        module.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(10), strict=False)]
    assert len({caption for batch in batches for caption in batch["captions"]}) == 70
    consume(data, batches[4], training=True)
    restored.load_state_dict(data.state_dict())
    assert next(iter(restored.train_dataloader()))["keys"] == batches[5]["keys"]


WIDE = {"buckets": [[32, 32], [24, 40]]}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write shards of square and wide pictures: 20 and 12 for training, 5 and 3 for validation."""
    root = tmp_path_factory.mktemp("wide")
    for name, count in (("train-0", 32), ("val-0", 8)):
        samples = pairs(0, count)
        for number, sample in enumerate(samples):
            sample["png"] = png((60, 36) if number % 8 < 3 else (40, 40))
        write_shard(root / f"{name}.tar", samples)
    return root


def test_latent_batches_have_the_shapes_of_their_buckets(wide: Path, codec: LatentCodec) -> None:
    data = datamodule(wide, codec=codec, batch_size=4, **WIDE)
    train = data.train_dataloader()
    shapes = [consume(data, batch, training=True).z0.shape for batch, _ in zip(train, range(16), strict=False)]
    assert set(shapes) == {(4, 4, 8, 8), (4, 4, 6, 10)}
    assert Counter(shapes)[4, 4, 8, 8] == pytest.approx(10, abs=3)
    held_out = [(len(batch["keys"]), batch["x"].shape[3]) for batch in data.val_dataloader()]
    assert held_out == [(5, 32), (3, 40)]


def test_buckets_resume_from_a_checkpoint(wide: Path) -> None:
    data, restored, other = (datamodule(wide, batch_size=size, **WIDE) for size in (4, 4, 3))
    train = iter(data.train_dataloader())
    consume(data, next(train), training=True)
    for module in (restored, other):
        module.load_state_dict(data.state_dict())
    assert next(iter(restored.train_dataloader()))["keys"] == next(train)["keys"]
    batch = next(iter(other.train_dataloader()))  # the order resumes at the next multiple of its batch size
    assert batch["position"] == 9
    assert len(batch["keys"]) == 3


def test_order_without_its_buckets_starts_anew(wide: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, other = datamodule(wide, **WIDE), datamodule(wide)
    consume(data, next(iter(data.train_dataloader())), training=True)
    other.load_state_dict(data.state_dict())
    assert other.position == 0
    assert "the order of the training data starts anew" in caplog.text


def test_bucket_off_the_vaes_grid_is_a_user_error(shards: Path, codec: LatentCodec) -> None:
    with pytest.raises(UserError, match="24 x 42 has a side that is not a multiple of the VAE's factor 4"):
        datamodule(shards, codec=codec, buckets=[[24, 42]])


def test_latents_have_no_buckets(shards: Path, codec: LatentCodec) -> None:
    with pytest.raises(UserError, match=r"lcm\.encode has already cropped and flipped .*: leave .*data\.buckets out"):
        datamodule(shards, codec=codec, latents=True, buckets=2)


def test_filters_hold_for_training_and_validation(shards: Path) -> None:
    whole, filtered = datamodule(shards), datamodule(shards, filters=Filters(max_caption=35))
    used = [
        sum(source.notes(n).samples for source in data.train_sources for n in range(len(source.urls)))
        for data in (whole, filtered)
    ]
    assert 0 < used[1] < used[0]
    batches = [*filtered.val_dataloader(), next(iter(filtered.train_dataloader()))]
    assert all(len(caption) <= 35 for batch in batches for caption in batch["captions"])


def test_filter_without_its_fields_is_named(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    datamodule(shards, filters=Filters(min_aesthetic=6, max_caption=100))
    assert "data.filters.min_aesthetic leaves out nothing, because no sample has the field that it reads" in caplog.text
    assert "max_unsafe" not in caplog.text  # a default limit causes no warning
    assert "max_caption" not in caplog.text
    caplog.clear()
    datamodule(shards, filters=Filters(max_unsafe=0.3, max_caption=100))
    assert "data.filters.max_unsafe leaves out nothing" in caplog.text
    caplog.clear()
    datamodule(shards, filters=Filters(max_unsafe=None, max_caption=100))
    assert "leaves out nothing" not in caplog.text


def test_filters_that_keep_nothing_are_a_user_error(shards: Path) -> None:
    data = datamodule(shards, filters=Filters(max_caption=1), val_shards=None)
    with pytest.raises(UserError, match=r"no usable sample: left out are .*caption.*; change data\.shards or data\.filters"):
        next(iter(data.train_dataloader()))


def test_skipped_samples_are_logged_and_limited(shards: Path) -> None:
    data, logged = datamodule(shards, batch_size=100), []
    batch = {**next(iter(data.train_dataloader())), "skipped": {"image": 3}, "left_out": {}}
    consume(data, batch, training=True)
    data.trainer.loggers = [SimpleNamespace(log_metrics=lambda metrics, step: logged.append((metrics, step)))]
    data.on_after_batch_transfer({**batch, "skipped": {"image": 1, "json": 1}, "left_out": {"side": 7}}, 0)
    assert logged == [({"data/skipped/image": 4, "data/skipped/json": 1, "data/left_out/side": 7}, 3)]
    assert data.state_dict()["skips"] == {"seen": 200, "by_reason": {"image": 4, "json": 1}}
    for _ in range(7):
        data.on_after_batch_transfer({**batch, "skipped": {"image": 10}}, 0)
    with pytest.raises(UserError, match=r"85 of 1000 samples were damaged and skipped .*data\.max_skip_ratio=0\.05"):
        data.on_after_batch_transfer({**batch, "skipped": {"image": 10}}, 0)


def lose(workers: list[Any], sign: signal.Signals, batches: Iterator[Any]) -> None:
    for worker in workers[:1] if sign is signal.SIGKILL else workers:
        os.kill(worker.pid, sign)
    for _ in batches:
        pass


@pytest.mark.parametrize(
    ("sign", "says"), [(signal.SIGKILL, "a data worker died"), (signal.SIGSTOP, "no data came for 1 seconds")], ids=str
)
def test_lost_worker_is_a_user_error(shards: Path, sign: signal.Signals, says: str) -> None:
    data = datamodule(shards, num_workers=2)
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    if sign is signal.SIGSTOP:
        loader.patience = 1  # set after the first batch, because workers start slowly on a busy machine
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    with pytest.raises(UserError, match=says), workers_watched():
        lose(workers, sign, batches)
    if sign is signal.SIGSTOP:  # after SIGKILL, the other worker ends with its loader
        assert not any(worker.is_alive() for worker in workers)
    kill(workers)


def hold(size: int, started: Any) -> None:
    memory = b"1" * size
    started.release()
    signal.pause()
    assert memory


def test_kill_leaves_no_worker() -> None:
    def torch_handler(*args: Any) -> None:  # torch's handler raises this error, too
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    started = multiprocessing.Semaphore(0)
    workers = [multiprocessing.Process(target=hold, args=(size, started)) for size in (2**28, 1)]  # the larger one ends last
    for worker in workers:
        worker.start()
        started.acquire()
    before = signal.signal(signal.SIGCHLD, torch_handler)
    try:
        kill(workers)
        assert not any(worker.is_alive() for worker in workers)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda sign: sign.name)
def test_signal_to_all_processes_leaves_workers_alone(
    shards: Path, sign: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(worker: int) -> None:
        os.kill(os.getpid(), sign)  # the signal comes while the worker starts
        init_worker(worker)
        os.kill(os.getpid(), sign)

    monkeypatch.setattr("lcm.data.workers.init_worker", signalled)
    others = multiprocessing.active_children()
    data = datamodule(shards, num_workers=2, timeout=60)
    data.setup()
    batches = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    workers = set(multiprocessing.active_children()) - set(others)
    assert len(workers) == 2
    kill(list(workers))


@pytest.mark.parametrize("says_who", [True, False], ids=["linux", "macos"])
def test_worker_ends_when_its_parent_asks(says_who: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no sigwaitinfo, which tells who sent a signal."""
    if not says_who:
        monkeypatch.delattr(signal, "sigwaitinfo")
    monkeypatch.setattr("lcm.runtime.signals.GRACE", 0.1)

    def work() -> None:
        init_worker(0)
        started.set()
        time.sleep(60)

    started = multiprocessing.get_context("fork").Event()
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    with signals.held_back():
        worker.start()
    assert started.wait(30)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_other_errors_are_not_a_workers() -> None:
    with pytest.raises(RuntimeError, match="shapes"), workers_watched():
        raise RuntimeError("shapes do not fit")


def test_messages_name_the_option_of_the_shards(shards: Path, tmp_path: Path) -> None:
    latents = write_tar(tmp_path / "0.tar", [("0.latent.npy", b""), ("0.txt", b"a cat")])
    with pytest.raises(UserError, match=r"0\.tar holds latents, not pictures: set callbacks\.evaluation\.shards to shards of"):
        datamodule(shards).make_source(latents, "callbacks.evaluation.shards").check()
    with pytest.raises(UserError, match=r"no shards match .*: point data\.sources at"):
        ShardDataModule(sources=[{"urls": f"{tmp_path}/none.tar", "weight": 1}]).setup()


@pytest.mark.parametrize(
    ("members", "options", "says"),
    [
        ({"json": {"aesthetic": 5.0}}, {"filters": Filters(min_aesthetic=6)}, r"\{'aesthetic': 3\}; change data\.val_shards"),
        ({"txt": "", "json": b"{"}, {"filters": Filters()}, "has no captions that can be read .json: "),
        ({"txt": b"\xff"}, {}, "has no captions that can be read .caption_encoding: "),
        ({"png": b"no png"}, {}, r"no sample of data\.val_shards could be decoded"),
    ],
    ids=["score", "json", "encoding", "picture"],
)
def test_validation_without_usable_samples_is_refused(
    shards: Path, tmp_path: Path, members: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    """Without this error the validation pass is empty. Lightning then logs neither val/loss nor a message."""
    held_out = write_shard(tmp_path / "v.tar", [{**sample, **members} for sample in pairs(0, 3)])
    with pytest.raises(UserError, match=says):
        datamodule(shards, val_shards=held_out, **options)


@pytest.mark.parametrize(
    ("program", "members", "says"),
    [
        ("encode", {"txt": 201 * "a"}, r"left out are \{'caption_long': 3\}; change data\.shards"),
        ("preview", {"png": b"no png"}, r"no sample of data\.shards could be decoded, see the warnings above: repair it$"),
    ],
    ids=["filtered", "damaged"],
)
def test_programs_refuse_shards_without_usable_samples(
    program: str, members: dict[str, Any], says: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unusable = write_shard(tmp_path / "0.tar", [{**sample, **members} for sample in pairs(0, 3)])
    output = [f"out={tmp_path / 'out'}", f"data.codec.pipeline={tiny_pipeline}", "device=cpu"]
    overrides = [f"data.shards={unusable}", "data.num_workers=0", "data.resolution=32", f"data.index={tmp_path / 'index'}"]
    overrides += [
        "data=shards",
        "data.filters.max_caption=200",
        *(output if program == "encode" else [f"output={tmp_path / 'out'}"]),
    ]
    monkeypatch.setattr("sys.argv", [program, *overrides])
    with pytest.raises(SystemExit, match=says):
        importlib.import_module(f"lcm.{program}").main()
    assert not list((tmp_path / "out").iterdir())


def test_one_sound_validation_sample_is_enough(shards: Path, tmp_path: Path) -> None:
    samples = pairs(0, 3)
    samples[0]["png"] = samples[1]["png"] = b"no png"
    data = datamodule(shards, val_shards=write_shard(tmp_path / "v.tar", samples))
    assert [batch["captions"] for batch in data.val_dataloader()] == [["sample 2 of 0"]]


BUS_ERROR = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of shared memory."
NO_SPACE = "unable to allocate shared memory(shm) for file </torch_7_1_1>: No space left on device (28)"


def test_worker_killed_by_full_shared_memory_is_named() -> None:
    with pytest.raises(UserError, match=r"^shared memory .*--shm-size"), workers_watched():
        raise RuntimeError(BUS_ERROR)


def test_full_shared_memory_is_one_sentence(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch moves a batch to shared memory in a thread of the worker. The thread only prints errors, and training waits."""

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(NO_SPACE)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    data = datamodule(shards, num_workers=1, timeout=60)
    with pytest.raises(UserError, match=r"^shared memory .*data\.num_workers=0, which needs none$"):
        next(iter(data.train_dataloader()))
