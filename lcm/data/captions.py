"""Captions and images of shards, without a training loop."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lcm.data.members import Sample, Skip, caption_of
from lcm.data.order import Order
from lcm.data.shards import expand_urls
from lcm.data.source import Source
from lcm.data.stream import ShardStream
from lcm.data.transforms import Decode, collate


def read_samples(shards: str | list[str], option: str = "shards") -> Iterator[Sample]:
    """Every usable sample once, undecoded, in order."""
    source = Source(expand_urls(shards, option))
    source.check()
    for number in range(len(source.urls)):
        shard = source.open(number)
        yield from shard
        shard.close()


def read_captions(shards: str | list[str], limit: int | None = None, *, option: str = "shards") -> list[str]:
    """The first `limit` captions, in the shards' order; option: the configuration key to name where there are none."""
    captions: list[str] = []
    for sample in read_samples(shards, option):
        if len(captions) == limit:
            break
        with suppress(Skip):
            captions.append(caption_of(sample))
    return captions


def read_images(shards: str | list[str], *, resolution: int, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """Every sample once, in order: `{"x": uint8 [B, 3, S, S], "captions", "keys", ...}`."""
    source = Source(expand_urls(shards, "shards"))
    order = Order([facts.samples for facts in source.facts()])
    return iter(
        ShardStream([source], order, decode=Decode(resolution), collate=collate, batch_size=batch_size, stop=order.size)
    )
