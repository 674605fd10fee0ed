"""Captions and images of shards, for programs other than training."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lcm.data.sample_fields import CaptionChoice, Sample, Skip
from lcm.data.source import Source
from lcm.data.stream import PassStream, rng_of
from lcm.data.transforms import Decode, collate


def read_samples(source: Source) -> Iterator[Sample]:
    """Yield every usable sample once, undecoded, in order."""
    source.check()
    for shard in range(len(source.urls)):
        number = 0
        while number < source.usable(shard, number + 1)[0]:
            with suppress(Skip):
                yield source.read(shard, number)
            number += 1


def read_captions(source: Source, limit: int | None = None) -> list[str]:
    """Return the captions of the first `limit` samples, or of all, in the order and with the choice of `read_images`."""
    captions: list[str] = []
    choose = CaptionChoice(weights=source.captions)
    for position, sample in enumerate(read_samples(source)):
        if len(captions) == limit:
            break
        with suppress(Skip):
            captions.append(choose(sample, rng_of(0, position)))
    return captions


def read_images(source: Source, *, resolution: int, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """Yield every sample once, in order: `{"x": uint8 [B, 3, S, S], "captions", "keys", ...}`."""
    decode = Decode(resolution, captions=source.captions)
    return iter(PassStream(source, decode=decode, collate=collate, batch_size=batch_size))
