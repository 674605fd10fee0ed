"""Shards for the benchmarks: synthetic photos, and latents as `lcm.encode` writes them."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image

from lcm.core.random import generator
from lcm.data.datamodule import ShardDataModule
from lcm.data.encoding import Encoder, Variants, collate_variants
from lcm.data.latents import stamp
from lcm.data.source import Source
from lcm.data.stream import PassStream
from lcm.data.transforms import Decode
from lcm.encode import claim, encode_shards
from lcm.models.codec import LatentCodec

DISTINCT = 200  # photos that differ; drawing one takes longer than reading it


def photo(size: int, rng: torch.Generator) -> bytes:
    """Return a square JPEG of quality 90: noise in every octave, mostly grey, with the spectrum of a smoothed photo."""
    picture, cells = torch.zeros(1, 3, size, size), 2
    while cells <= size:
        noise = torch.randn(1, 1, cells, cells, generator=rng) + 0.3 * torch.randn(1, 3, cells, cells, generator=rng)
        picture += F.interpolate(noise, (size, size), mode="bicubic", align_corners=False) / cells**0.4
        cells *= 2
    picture = (picture - picture.mean()) / picture.std() * 50 + 120
    file = io.BytesIO()
    Image.fromarray(picture[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


def photo_shard(path: str | Path, *, count: int, size: int, metadata: bool = False) -> str:
    """Write one shard of `count` photos in the layout of img2dataset, unless it exists. Return its path.

    metadata: write the .json members that filters read, too.
    """
    if Path(path).is_file():
        return str(path)
    print(f"writing {path}: {count} synthetic photos of {size} px", flush=True)
    rng = generator("cpu", "photos", size)
    pictures = [photo(size, rng) for _ in range(min(DISTINCT, count))]
    meta = {"width": size, "height": size, "original_width": 640, "original_height": 480, "punsafe": 0.01, "pwatermark": 0.1}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, wds.TarWriter(file, mtime=0) as writer:
        for number in range(count):
            key, caption = f"{number:09d}", f"a synthetic photo, number {number}"
            record = {**meta, "caption": caption, "key": key, "url": f"http://example.org/{number}.jpg"}
            metadata_members = {"json": record} if metadata else {}
            writer.write({"__key__": key, "jpg": pictures[number % len(pictures)], "txt": caption, **metadata_members})
    return str(path)


def write_latents(shard: str, folder: Path, *, codec: LatentCodec, resolution: int) -> str:
    """Write the latent shard of a shard of images, as `python -m lcm.encode` does. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, stamp(codec, resolution), rank=0)
    target, data = folder / Path(shard).name, ShardDataModule(shard, resolution=resolution, num_workers=0)
    with torch.inference_mode():
        encoder, decode = Encoder(codec, data.seed, drawn=False, text=False), Variants(Decode(resolution), 1, False)
        source = Source([shard])
        stream = PassStream(source, decode=decode, collate=collate_variants, batch_size=data.val_batch_size, by_shard=True)
        encode_shards(source, [target], stream, encoder, data)
    return str(target)
