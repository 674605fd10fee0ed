"""From the bytes of a shard's sample to a square RGB tensor and a caption."""

import io
import json
import random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lcm.data.shards import Sample, image_key

MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: a 17 kB file can ask for gigabytes


def square(image: Image.Image, size: int, *, random_crop: bool, flip: bool, rng: random.Random) -> Image.Image:
    """Upright RGB, cropped square, resized to `size` (antialiased), mirrored with p = 0.5 if `flip`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image, (width, height) = image.convert("RGB"), image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if random_crop:
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    box = (left, top, left + side, top + side)  # cropped first: a thread of an image must not become a huge one
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return ImageOps.mirror(image) if flip and rng.random() < 0.5 else image


def caption_of(sample: Sample) -> str:
    """The .txt member, else the .json member's "caption"."""
    text = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"]
    return text.strip()


class Decode:
    """`sample -> {"x": uint8 [3, size, size], "caption", "key"}`; the caption is "" with probability `caption_dropout`."""

    def __init__(self, resolution: int, *, caption_dropout: float = 0.0, random_crop: bool = False, flip: bool = False):
        self.resolution, self.caption_dropout = resolution, caption_dropout
        self.random_crop, self.flip = random_crop, flip

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        name = image_key(sample)
        assert name is not None, "read_samples lets no sample without an image through"
        stored = Image.open(io.BytesIO(sample[name]))
        if stored.width * stored.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{stored.width} x {stored.height} pixels are more than {MAX_PIXELS}")
        image = square(stored, self.resolution, random_crop=self.random_crop, flip=self.flip, rng=rng)
        dropped = rng.random() < self.caption_dropout
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return {"x": x, "caption": "" if dropped else caption_of(sample), "key": f"{sample['__url__']}/{sample['__key__']}"}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """`{"x": uint8 [B, 3, S, S], "captions": list[str], "keys": list[str]}`."""
    return {
        "x": torch.stack([sample["x"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
    }
