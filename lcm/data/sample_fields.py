"""Metadata and captions of a sample."""

import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lcm.core.errors import UserError
from lcm.data.filters import lowered
from lcm.runtime.atomic_io import text_of

Sample = dict[str, Any]  # "__key__", "__url__" and bytes by extension
CAPTIONS = ("txt", "caption", "cap")  # members or .json fields; without data.captions the first one with text is read
KINDS = {"dict": "an object", "list": "a list in a list", "bool": "true or false"}  # names of JSON types in messages
SHOWN = 20  # fields that a message names


# The reasons for which a sample is damaged. The reasons of filters are in `lcm.data.filters.RULES`.
REASONS = {
    "shard": "its shard cannot be had or read",
    "missing": "its shard holds fewer samples than a manifest or an earlier count says",
    "cut": "its shard ends within it",
    "name": "its name has .. in it",
    "apart": "its members do not follow each other",
    "link": "it is a link to a file that is not in its shard",
    "duplicate": "its name stands for several images or captions, and nothing tells which belong together",
    "bytes": "it has more bytes than any image",
    "no_image": "it has no image",
    "image": "its image cannot be decoded",
    "pixels": "its image has more pixels than are decoded",
    "tiny": "its image is a pixel wide or high",
    "json": "its .json is no JSON object",
    "no_caption": "it has no text under the names of data.captions",
    "caption_encoding": "its caption is not UTF-8",
    "latent": "a stored array is damaged",
}


def described(reason: str) -> str:
    """Return a reason to leave a sample out, with its meaning if it is damage."""
    return f"{reason} ({REASONS[reason]})" if reason in REASONS else reason


class Skip(Exception):
    """A sample that cannot be used. reason: one of `REASONS`. detail: the cause, for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextmanager
def skipping(reason: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise `Skip` in place of these errors."""
    try:
        yield
    except Skip:
        raise
    except errors as error:
        raise Skip(reason, f"{type(error).__name__}: {error}") from error


def metadata(sample: Sample) -> dict[str, Any]:
    """Return the .json member with lower-case names, {} without one. Raises `Skip("json")`."""
    with skipping("json", ValueError, RecursionError):
        content = json.loads(sample.get("json", b"{}"))
    if not isinstance(content, dict):
        raise Skip("json", f"{type(content).__name__} instead of an object")
    return dict(lowered(content))


def captions_of(
    sample: Sample, captions: Mapping[str, float] | None = None, meta: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
    """Return the captions of a sample, by the name of their member or .json field.

    captions: the names to read; None: the first of `CAPTIONS` with a text. meta: the sample's `metadata`, if it is known. Blank
    texts count only in a sample without other texts. Raises `Skip("no_caption")` or `Skip("caption_encoding")`.
    """
    meta, texts = metadata(sample) if meta is None else meta, dict[str, list[str]]()
    for name in captions or CAPTIONS:
        if values := texts_of(name, sample.get(name, meta.get(name))):
            texts[name] = values
            if captions is None and any(values):
                break
    if not texts:
        members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        fields = f" and the .json fields {', '.join(sorted(meta)[:SHOWN])}" if meta else ""
        raise Skip("no_caption", f"none of {', '.join(captions or CAPTIONS)} among {members}{fields}: see data.captions")
    not_blank = {name: [text for text in values if text] for name, values in texts.items() if any(values)}
    return dict(list(not_blank.items() or texts.items())[: None if captions else 1])


def texts_of(name: str, content: Any) -> list[str]:
    """Return the texts of a member or field. content: a text, a list of texts, or None. Raises `Skip`."""
    texts = [text for text in (content if isinstance(content, list) else [content]) if text is not None]
    if types := [type(text).__name__ for text in texts if not isinstance(text, str | bytes)]:
        raise Skip("no_caption", f"{name} holds {KINDS.get(types[0], 'a number')}, not text: name another in data.captions")
    try:  # a JSON escape can hold a NUL, or half an emoji, which no tokenizer takes
        return [text_of(text if isinstance(text, bytes) else text.encode()).strip() for text in texts]
    except UnicodeError as error:
        raise Skip("caption_encoding", f"{name}: {error}") from error


def caption_of(sample: Sample, captions: Mapping[str, float] | None = None) -> str:
    """Return the first caption. Raises `Skip`."""
    return next(iter(captions_of(sample, captions).values()))[0]


class CaptionChoice:
    """`(sample, rng) -> caption`: "" with probability `dropout`, else one of the sample's captions.

    weights: the weights by which a member or .json field is drawn. None: the first of `CAPTIONS` with text. One text of a list
    is drawn. Raises `Skip` for a sample without a caption, even if `dropout` drops it.
    """

    def __init__(self, dropout: float = 0.0, weights: Mapping[str, float] | None = None) -> None:
        self.dropout, self.weights = dropout, None if weights is None else weights_of(weights)

    def __call__(self, sample: Sample, rng: random.Random) -> str:
        captions = captions_of(sample, self.weights)
        if rng.random() < self.dropout:
            return ""
        texts = next(iter(captions.values()))
        if self.weights:
            texts = rng.choices(list(captions.values()), [self.weights[name] for name in captions])[0]
        return texts[0] if len(texts) == 1 else rng.choice(texts)


def weights_of(captions: Mapping[str, float]) -> dict[str, float]:
    """Return the weights above zero, with lower-case names as in `metadata`."""
    try:
        weights = {str(name).lower().lstrip("."): float(weight) for name, weight in captions.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"data.captions={captions!r}: expected a weight for each name, such as {{txt: 1, blip: 3}}") from error
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise UserError(f"data.captions={captions!r}: expected finite weights of at least 0, one of them above it")
    if "json" in weights:
        raise UserError(f"data.captions={captions!r}: name the fields of the .json that hold captions, as {{caption: 1}}")
    return {name: weight for name, weight in weights.items() if weight}
