"""Whether a worker's memory stays flat over a long reading."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from lcm.bench.measure import Table, children, one_thread, resident_mb
from lcm.bench.shards import write_latents, write_photos
from lcm.data.datamodule import ShardDataModule
from lcm.data.shards import expand_urls
from lcm.models.pipeline import load_codec

WARM_UP = 0.3  # of the samples: caches fill, and the allocator finds its size
SAMPLED = 400  # times that memory is looked at


def resident(data: ShardDataModule, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """How many samples were read, and the resident MB of the one worker then."""
    data.setup()
    loader: DataLoader = data.train_dataloader()
    before, batches = set(children()), samples // data.batch_size
    read, memory = [], []
    for number, _ in zip(range(batches), loader, strict=False):
        if number == 0:
            [worker] = set(children()) - before
        if number % max(batches // SAMPLED, 1) == 0:
            read.append(number * data.batch_size)
            memory.append(resident_mb(worker))
    return np.array(read), np.array(memory)


def slope(read: np.ndarray, memory: np.ndarray) -> float:
    """MB a sample, the least-squares line after the warm-up."""
    late = read >= WARM_UP * read[-1]
    return float(np.polyfit(read[late], memory[late], 1)[0])


def measure(
    *, shards: str, pipeline: str, resolution: int, photo_size: int, photos: int, samples: int, batch_size: int
) -> Table:
    """One worker reads `samples` of each kind: the small images, `photos` JPEGs over and over, latents of the small images."""
    with TemporaryDirectory() as folder, one_thread():
        codec, small = load_codec(pipeline), expand_urls(shards)
        photo = write_photos(Path(folder, "photos.tar"), count=photos, size=photo_size)
        latents = write_latents(small[0], Path(folder, "latents"), codec=codec, resolution=resolution)
        options: dict[str, Any] = {"resolution": resolution, "batch_size": batch_size, "num_workers": 1}
        kinds = {
            f"images of {resolution} px, {len(small)} shards": ShardDataModule(small, **options),
            f"JPEGs of {photo_size} px": ShardDataModule(photo, random_crop=True, flip=True, **options),
            f"latents of {resolution} px": ShardDataModule(latents, codec=codec, latents=True, **options),
        }
        rows = []
        for name, data in kinds.items():
            read, memory = resident(data, samples)
            [epoch] = data.sizes
            rows.append({
                "data": name, "samples an epoch": epoch, "epochs": samples / epoch,
                "MB at first": float(memory[0]), "after the warm-up": float(memory[read >= WARM_UP * read[-1]][0]),
                "at the end": float(memory[-1]), "MB an epoch": slope(read, memory) * epoch,
                "MB per 100,000 samples": slope(read, memory) * 1e5,
            })  # fmt: skip
    note = (
        f"Resident memory of the one worker over {samples} samples, looked at {SAMPLED} times; the slope is a least-squares "
        f"line without the first {WARM_UP:.0%}."
    )
    return Table("Memory of a worker", rows, note)
