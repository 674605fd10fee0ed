"""Captions and images of shards, without a training loop."""

from collections.abc import Iterator
from typing import Any

from lcm.data.shards import ShardStream, expand_urls, read_samples
from lcm.data.transforms import Decode, caption_of, collate


def read_captions(shards: str | list[str], limit: int | None = None, *, option: str = "shards") -> list[str]:
    """The first `limit` captions, in the shards' order; option: the configuration key to name where there are none."""
    captions = []
    for sample in read_samples(expand_urls(shards, option)):
        captions.append(caption_of(sample))
        if len(captions) == limit:
            break
    return captions


def read_images(shards: str | list[str], *, resolution: int, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """Every sample once, in order: `{"x": uint8 [B, 3, S, S], "captions", "keys", "cursor"}`."""
    return iter(ShardStream(expand_urls(shards, "shards"), decode=Decode(resolution), collate=collate, batch_size=batch_size))
