"""Small shards and streams over them."""

import io
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

from lcm.data.left_out import LeftOutLog
from lcm.data.order import Order
from lcm.data.sample_fields import Sample
from lcm.data.source import Source
from lcm.data.stream import PassStream, Stream, TrainStream

SIZES = (11, 12, 13, 9)  # 45 samples in 4 shards: no batch size of the tests divides an epoch


def png(size: tuple[int, int] = (8, 8), colour: Any = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> str:
    with path.open("wb") as file, wds.TarWriter(file, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    """Write a tar with these files in this order. Return its path."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def pairs(shard: int, count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"{shard}-{i:02d}", "png": png(), "txt": f"sample {i} of {shard}"} for i in range(count)]


@pytest.fixture(autouse=True)
def name_all_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test new logs of left-out samples. A log names only the first samples for each reason."""
    monkeypatch.setattr("lcm.data.index.left_out_log", LeftOutLog())
    monkeypatch.setattr("lcm.data.folder.left_out_log", LeftOutLog())


@pytest.fixture(scope="session")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("shards")
    return [write_shard(root / f"{shard:03d}.tar", pairs(shard, count)) for shard, count in enumerate(SIZES)]


def keep(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {"key": sample["__key__"], "draw": rng.random()}


def gather(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"keys": [sample["key"] for sample in samples], "draws": [sample["draw"] for sample in samples]}


def stream(source: Source | list[str], *, shuffle: int = 16, lanes: int = 3, seed: int = 0, **options: Any) -> Stream:
    """Return a stream of keys and draws. With shuffle=0 the stream is one ordered pass."""
    source = source if isinstance(source, Source) else Source(source)
    options = {"decode": keep, "collate": gather, "batch_size": 4, "seed": seed, **options}
    if not shuffle:
        return PassStream(source, **options)
    return TrainStream([source], Order([source], [1.0], seed=seed, shuffle=shuffle, lanes=lanes), **options)


def take(source: Stream, count: int | None = None, workers: int = 0, context: str | None = None) -> list[dict[str, Any]]:
    return list(islice(DataLoader(source, batch_size=None, num_workers=workers, multiprocessing_context=context), count))


def keys(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def samples_of(source: Source, shard: int = 0) -> list[Sample]:
    """Return the usable samples of a shard."""
    return [source.read(shard, number) for number in range(source.notes(shard).samples)]


def sample_keys(source: Source, shard: int = 0) -> list[str]:
    return [sample["__key__"] for sample in samples_of(source, shard)]
