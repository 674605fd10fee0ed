"""How fast images and latents are read: ours, the peers' way, and a bare decode, all in one run."""

import io
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from lcm.bench import peers
from lcm.bench.measure import Rate, Table, in_turn, one_thread, reading_rate
from lcm.bench.shards import write_latents, write_photos
from lcm.data.datamodule import ShardDataModule
from lcm.data.latents import POSTERIOR
from lcm.data.shards import IMAGES, Shard, expand_urls, first_of
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec

Loader = Callable[[int], Iterator[int]]  # workers -> sizes of batches, endless


def ours(shard: str, *, resolution: int, batch_size: int, codec: LatentCodec | None = None, floats: bool = False) -> Loader:
    """What training reads. codec: the shard holds its latents. floats: convert the pixels here, which a GPU does otherwise."""

    def batches(workers: int) -> Iterator[int]:
        options: dict[str, Any] = {"latents": codec is not None, "num_workers": workers}
        data = ShardDataModule(shard, codec=codec, resolution=resolution, batch_size=batch_size, **options)
        data.setup()
        for batch in data.train_dataloader():
            if floats:
                data.on_after_batch_transfer(batch, 0)
            yield len(batch["captions"])

    return batches


def theirs(loader: Callable[..., Iterator[Any]]) -> Loader:
    return lambda workers: (len(captions) for _, captions in loader(workers=workers))


def bare_decode(shard: str) -> Loader:
    """PIL at full size, from memory: no pipeline that decodes all pixels is faster."""

    def images(workers: int) -> Iterator[int]:
        contents = [sample[name] for sample in itertools.islice(Shard(shard), 32) if (name := first_of(sample, IMAGES))]
        for content in itertools.cycle(contents):
            Image.open(io.BytesIO(content)).load()
            yield 1

    return images


def sample_kb(shard: str) -> float:
    samples = itertools.islice(Shard(shard, needs=(*IMAGES, POSTERIOR)), 100)
    return statistics.mean(sum(len(v) for v in sample.values() if isinstance(v, bytes)) for sample in samples) / 1e3


def measure(
    *,
    shards: str,
    pipeline: str,
    resolution: int,
    photo_size: int,
    photo_resolution: int,
    photos: int,
    batch_size: int,
    workers: int,
    seconds: float,
    repeats: int,
) -> Table:
    """shards: small images, read at `resolution`; photos: so many JPEGs of `photo_size`, read at `photo_resolution`.

    Latents are encoded with `pipeline`: of the small images, and of the photos at half of `photo_resolution`, which for the
    mini VAE (factor 4) are as large as Stable Diffusion's (factor 8) at the whole.
    """
    with TemporaryDirectory() as folder, one_thread():
        codec, small = load_codec(pipeline), expand_urls(shards)[0]
        photo = write_photos(Path(folder, "photos.tar"), count=photos, size=photo_size)
        sizes = {"small": resolution, "photo": photo_resolution // 2}
        small_latents, photo_latents = (
            write_latents(shard, Path(folder, name), codec=codec, resolution=sizes[name])
            for name, shard in (("small", small), ("photo", photo))
        )
        plain = partial(peers.image_loader, batch_size=batch_size)
        latents = partial(peers.latent_loader, batch_size=batch_size)
        lanczos = Image.Resampling.LANCZOS
        contenders: dict[tuple[str, str, str], Loader] = {
            (photo, f"{photo_size} px JPEG to {photo_resolution} px", "bare decode"): bare_decode(photo),
            (photo, "", "peers, Lanczos"): theirs(partial(plain, photo, size=photo_resolution, resample=lanczos)),
            (photo, "", "peers, bilinear"): theirs(partial(plain, photo, size=photo_resolution)),
            (photo, "", "ours"): ours(photo, resolution=photo_resolution, batch_size=batch_size),
            (photo, "", "ours, to float32"): ours(photo, resolution=photo_resolution, batch_size=batch_size, floats=True),
            (small, f"small images to {resolution} px", "bare decode"): bare_decode(small),
            (small, "", "peers, bilinear"): theirs(partial(plain, small, size=resolution)),
            (small, "", "ours"): ours(small, resolution=resolution, batch_size=batch_size),
            (small, "", "ours, to float32"): ours(small, resolution=resolution, batch_size=batch_size, floats=True),
            (photo_latents, f"latents of {photo_resolution} px (SD)", "webdataset"): theirs(partial(latents, photo_latents)),
            (photo_latents, "", "ours"): ours(photo_latents, resolution=sizes["photo"], batch_size=batch_size, codec=codec),
            (small_latents, f"latents of {resolution} px (mini)", "webdataset"): theirs(partial(latents, small_latents)),
            (small_latents, "", "ours"): ours(small_latents, resolution=resolution, batch_size=batch_size, codec=codec),
        }
        ways = {
            f"{count}/{key[2]}/{key[0]}": partial(rate, loader, count, seconds)
            for key, loader in contenders.items()
            for count in (0, workers)
            if not (count and key[2] == "bare decode")
        }
        found = in_turn(ways, repeats)
        rows = []
        for key in contenders:
            alone, many = (found.get(f"{count}/{key[2]}/{key[0]}") for count in (0, workers))
            rows.append({
                "data": key[1], "pipeline": key[2], "kB a sample": sample_kb(key[0]),
                "images/s a core (CPU time)": max(r.cpu for r in alone or []),
                "images/s, no workers": max(r.wall for r in alone or []),
                f"images/s, {workers} workers": max(r.wall for r in many) if many else None,
            })  # fmt: skip
    note = (
        f"Best of {repeats} x {seconds} s, taken in turn, {batch_size} samples a batch, one thread a process, from a local "
        "disk in the page cache. CPU time is what the process spent without workers; the clock's rates suffer from whatever "
        "else runs. Ours are uint8, converted on the device; the peers' (webdataset, PIL's full decode, resize, crop, "
        "to_tensor, normalise) are float32."
    )
    return Table("Reading data", rows, note)


def rate(loader: Loader, workers: int, seconds: float) -> Rate:
    return reading_rate(loader(workers), seconds=seconds, warm_up=3 * workers + 1)
