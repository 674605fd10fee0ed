"""Rates of reading images and latents, beside the peers' loader."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lcm.bench import peers
from lcm.bench.measure import Table, in_turn, one_thread, reading_rate
from lcm.bench.shards import photo_shard, write_latents
from lcm.data.datamodule import ShardDataModule
from lcm.data.urls import expand_urls
from lcm.models.pipeline import load_codec

Loader = Callable[[int], Iterator[int]]  # number of workers -> batch sizes, endless


def our_batches(shard: str, **options: Any) -> Loader:
    """Return the loader that training uses. options: arguments of ShardDataModule."""

    def batch_sizes(workers: int) -> Iterator[int]:
        data = ShardDataModule(shard, num_workers=workers, **options)
        data.setup()
        return (len(batch["captions"]) for batch in data.train_dataloader())

    return batch_sizes


def peer_batches(loader: Callable[..., Iterator[Any]], shard: str, **options: Any) -> Loader:
    """Return a loader of the peers. options: arguments of `loader`, which is a function of `lcm.bench.peers`."""
    return lambda workers: (len(captions) for _, captions in loader(shard, workers=workers, **options))


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
    """Read small images (`shards`, at `resolution` px) and `photos` JPEGs of `photo_size` px (at `photo_resolution` px).

    `pipeline` encodes latents of both. Photos are encoded at half of `photo_resolution`: the mini VAE with factor 4 then gives
    latents as large as those of Stable Diffusion's VAE with factor 8.
    """
    with TemporaryDirectory() as folder, one_thread():
        codec, small, half = load_codec(pipeline), expand_urls(shards)[0], photo_resolution // 2
        photo = photo_shard(Path(folder, "photos.tar"), count=photos, size=photo_size)
        small_latents = write_latents(small, Path(folder, "small"), codec=codec, resolution=resolution)
        photo_latents = write_latents(photo, Path(folder, "photo"), codec=codec, resolution=half)
        batch = {"batch_size": batch_size}
        latents = {"codec": codec, "latents": True, **batch}
        contenders: dict[str, tuple[Loader, Loader]] = {
            f"{photo_size} px JPEG to {photo_resolution} px": (
                our_batches(photo, resolution=photo_resolution, **batch),
                peer_batches(peers.image_loader, photo, size=photo_resolution, **batch),
            ),
            f"small images to {resolution} px": (
                our_batches(small, resolution=resolution, **batch),
                peer_batches(peers.image_loader, small, size=resolution, **batch),
            ),
            f"latents of {photo_resolution} px (SD)": (
                our_batches(photo_latents, resolution=half, **latents),
                peer_batches(peers.latent_loader, photo_latents, **batch),
            ),
            f"latents of {resolution} px (mini)": (
                our_batches(small_latents, resolution=resolution, **latents),
                peer_batches(peers.latent_loader, small_latents, **batch),
            ),
        }

        def rate(loader: Loader, count: int) -> Any:
            return reading_rate(loader(count), seconds=seconds, warm_up=3 * count + 1)

        runs = {}
        for name, (our_loader, peer_loader) in contenders.items():
            runs[f"{name}, ours"] = partial(rate, our_loader, 0)
            runs[f"{name}, peers"] = partial(rate, peer_loader, 0)
            runs[f"{name}, ours, {workers} workers"] = partial(rate, our_loader, workers)
        rates = in_turn(runs, repeats, lambda result: f"{result.wall:.0f} samples/s")
    rows = []
    for name in contenders:
        our_rate, peer_rate = (max(result.cpu for result in rates[f"{name}, {contender}"]) for contender in ("ours", "peers"))
        rows.append({
            "data": name,
            "images/s a core": our_rate,
            "of the peers' rate": our_rate / peer_rate,
            f"images/s, {workers} workers": max(result.wall for result in rates[f"{name}, ours, {workers} workers"]),
        })  # fmt: skip
    note = (
        f"Best of {repeats} x {seconds} s, taken in turn. Batches have {batch_size} samples; a process has one thread; the "
        "shards are on a local disk. The rate a core counts CPU time without workers. Peers read images with webdataset and "
        "PIL, bilinearly resized, as float32; they read latents with webdataset."
    )
    return Table("Reading data", rows, note)
