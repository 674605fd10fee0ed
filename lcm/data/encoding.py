"""From decoded images to the samples of latent shards."""

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lcm.core.random import generator
from lcm.data.codec import LatentCodec
from lcm.data.latents import DRAWN, POSTERIOR, TEXT
from lcm.data.members import Sample
from lcm.data.shards import CAPTIONS
from lcm.data.transforms import Decode


@dataclass
class Variants:
    """`sample -> {"x": uint8 [V, 3, S, S], "caption", "members"}`: crops and mirrored copies of one image, and its texts."""

    decode: Decode
    crops: int
    flip: bool

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        decoded = [self.decode(sample, rng) for _ in range(self.crops)]
        x = torch.stack([one["x"] for one in decoded])
        texts = {name: sample[name] for name in CAPTIONS if name in sample}
        members = {"__key__": sample["__key__"], **texts}
        return {"x": torch.cat([x, x.flip(-1)]) if self.flip else x, "caption": decoded[0]["caption"], "members": members}


def gathered(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "x": torch.stack([sample["x"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "members": [sample["members"] for sample in samples],
    }


@dataclass
class Encoder:
    """A batch of `Variants` of a shard -> that shard's samples, as `DecodeLatents` takes them.

    drawn: a draw of each posterior, a function of (seed, shard, key), in place of its mean and standard deviation.
    text: the caption's text states, too, and as .txt member the caption.
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
            rngs = [generator("cpu", self.seed, shard, one["__key__"]) for one in members]
            noise = torch.stack([torch.randn(mean.shape[1:], generator=rng) for rng in rngs])
            latents, name = mean + std * noise, DRAWN
        states = self.codec.encode_text(batch["captions"]).half().cpu().numpy() if self.text else None
        for i, texts in enumerate(members):
            stored = {} if states is None else {TEXT: npy(states[i]), "txt": batch["captions"][i]}
            yield {**texts, name: npy(latents[i].half().numpy()), **stored}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
