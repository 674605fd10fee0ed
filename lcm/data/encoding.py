"""Encoding of decoded images to the samples of latent shards."""

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lcm.core.random import generator
from lcm.data.latents import DRAWN, POSTERIOR, SIZES, TEXTS
from lcm.data.sample_fields import CAPTIONS, Sample
from lcm.data.transforms import Decode
from lcm.data.urls import IMAGES
from lcm.models.codec import LatentCodec
from lcm.runtime.atomic_io import text_of

TEXT_MEMBERS = ("json", *CAPTIONS)


@dataclass
class Variants:
    """`sample -> {"x": uint8 [V, 3, S, S], "sizes": int64 [V, 4], "caption", "members"}`.

    x: V crops or mirrored copies of one image. sizes: original size and crop of each, as in `Decode`. members: the sample's
    metadata and captions.
    """

    decode: Decode
    crops: int
    flip: bool

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        decoded = [self.decode(sample, rng) for _ in range(self.crops)]
        x = torch.stack([variant["x"] for variant in decoded])
        captions = self.decode.choose.weights or ()
        texts = {name: content for name, content in sample.items() if name in captions or is_text(name, content)}
        members = {"__key__": sample["__key__"], **texts}
        sizes = torch.tensor([(*variant["original_size"], *variant["crop"]) for variant in decoded])
        if self.flip:
            x, sizes = torch.cat([x, x.flip(-1)]), torch.cat([sizes, mirrored(sizes, x.shape[-1])])
        return {"x": x, "sizes": sizes, "caption": decoded[0]["caption"], "members": members}


def is_text(name: str, content: Any) -> bool:
    """Return whether a member is text, by its name or its content. Text members are copied to latent shards."""
    with suppress(UnicodeError):
        return name in TEXT_MEMBERS or (not name.startswith("__") and name not in IMAGES and bool(text_of(content)))
    return False


def mirrored(sizes: torch.Tensor, side: int) -> torch.Tensor:
    """Return `sizes` `[V, 4]` for mirrored pictures. side: the pixels to which the shorter side was resized."""
    height, width, top, left = sizes.unbind(1)
    resized = (side * width / torch.minimum(height, width)).round().long()
    return torch.stack([height, width, top, (resized - side - left).clamp(min=0)], dim=1)


def collate_variants(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of the results of `Variants`: "x" `[B, V, 3, S, S]`, "sizes" `[B, V, 4]`, "captions" and "members"."""
    return {
        "x": torch.stack([sample["x"] for sample in samples]),
        "sizes": torch.stack([sample["sizes"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "members": [sample["members"] for sample in samples],
    }


@dataclass
class Encoder:
    """A batch of `collate_variants` -> the samples of a latent shard, as `DecodeLatents` reads them.

    drawn: store a sample of each posterior, a function of (seed, shard, key), instead of mean and standard deviation.
    text: also store the text embeddings, and the caption as the member .txt.
    Sizes are stored for a family whose network takes sizes.
    """

    codec: LatentCodec
    seed: int
    drawn: bool
    text: bool

    def __call__(self, batch: dict[str, Any], shard: str) -> Iterator[dict[str, Any]]:
        x, members = batch["x"], batch["members"]
        latents, name = self.codec.posterior(x.flatten(0, 1).to(self.codec.device)).cpu().unflatten(0, x.shape[:2]), POSTERIOR
        if self.drawn:
            mean, std = latents.chunk(2, dim=2)
            rngs = [generator("cpu", self.seed, shard, texts["__key__"]) for texts in members]
            noise = torch.stack([torch.randn(mean.shape[1:], generator=rng) for rng in rngs])
            latents, name = mean + std * noise, DRAWN
        arrays = {name: latents.half().numpy()}
        if self.codec.text.family.takes_sizes:
            arrays[SIZES] = batch["sizes"].numpy()
        if self.text:
            embeddings = self.codec.text(batch["captions"])
            arrays |= {TEXTS[name][0]: rows.half().cpu().numpy() for name, rows in embeddings.items()}
        for i, texts in enumerate(members):
            caption = {"txt": batch["captions"][i]} if self.text else {}
            yield {**texts, **caption, **{member: npy(array[i]) for member, array in arrays.items()}}


def npy(array: np.ndarray) -> bytes:
    """Return the content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
