"""What the members of a shard's sample say beside its picture: metadata and captions."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lcm.data.filters import lowered
from lcm.errors import UserError

Sample = dict[str, Any]  # "__key__", "__url__" and bytes by extension
CAPTIONS = ("txt", "caption")  # members or .json fields; without weights the first that says something


class Skip(Exception):
    """A sample that cannot be used.

    reason: "no_image", "bytes" or "pixels" (too many), "image" (it cannot be decoded), "tiny", "json", "no_caption" or
    "caption_encoding" (not UTF-8); detail: the same for a reader.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextmanager
def skipping(reason: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors of its block into a `Skip`."""
    try:
        yield
    except Skip:
        raise
    except errors as error:
        raise Skip(reason, f"{type(error).__name__}: {error}") from error


def metadata(sample: Sample) -> dict[str, Any]:
    """The .json member under lower-case names, {} without one; raises `Skip("json")`."""
    with skipping("json", ValueError, RecursionError):
        content = json.loads(sample.get("json", b"{}"))
    if not isinstance(content, dict):
        raise Skip("json", f"{type(content).__name__} instead of an object")
    return dict(lowered(content))


def captions_of(sample: Sample, meta: Mapping[str, Any], names: Iterable[str] = CAPTIONS) -> dict[str, str]:
    """The captions among the members, else the fields of `meta`, of these names; blank ones only where no other is found.

    Raises `Skip("no_caption")` or `Skip("caption_encoding")`.
    """
    found = {}
    for name in names:
        text = sample.get(name, meta.get(name))
        with skipping("caption_encoding", UnicodeError):
            if isinstance(text, str):
                text = text.encode()  # refuses the halves of emoji that a JSON escape can hold, as a tokenizer would
            if isinstance(text, bytes):
                found[name] = text.decode().strip()
    if not found:
        raise Skip("no_caption", f"none of {', '.join(names)}")
    return {name: text for name, text in found.items() if text} or found


def caption_of(sample: Sample) -> str:
    """The .txt member, else the .json member's "caption"; raises `Skip`."""
    return next(iter(captions_of(sample, metadata(sample)).values()))


class CaptionChoice:
    """`(sample, rng) -> caption`: "" with probability `dropout`, else one of the sample's captions.

    weights: members or .json fields that hold a caption, each with the weight of its being chosen among those that the sample
    has; None: the .txt member, else the .json member's "caption". Raises `Skip` where there is none, dropped or not.
    """

    def __init__(self, dropout: float = 0.0, weights: Mapping[str, float] | None = None) -> None:
        self.dropout, self.weights = dropout, None if weights is None else weights_of(weights)

    def __call__(self, sample: Sample, rng: random.Random) -> str:
        captions = captions_of(sample, metadata(sample), self.weights or CAPTIONS)
        if rng.random() < self.dropout:
            return ""
        if self.weights:
            return rng.choices(list(captions.values()), [self.weights[name] for name in captions])[0]
        return next(iter(captions.values()))


def weights_of(captions: Mapping[str, float]) -> dict[str, float]:
    """Those above zero, under lower-case names as a shard's members and `metadata` have them."""
    try:
        weights = {str(name).lower(): float(weight) for name, weight in captions.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"data.captions={captions!r}: expected a weight for each name, such as {{txt: 1, blip: 3}}") from error
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"data.captions={captions!r}: expected finite weights of at least 0, one of them above it")
    return {name: weight for name, weight in weights.items() if weight}
