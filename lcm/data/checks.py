"""Checks of a shard's first samples: pictures or latents, and readable captions."""

from collections.abc import Sequence
from itertools import islice

from lcm.core.errors import UserError
from lcm.data.index import Rules
from lcm.data.sample_fields import Sample, Skip, captions_of
from lcm.data.samples import Links, advice, samples
from lcm.data.tar import Bytes
from lcm.data.urls import IMAGES, LATENTS

LOOKED_AT = 100  # samples
SHOWN = 8  # extensions that a message lists


def first_samples(file: Bytes, rules: Rules) -> list[Sample]:
    """Return the first samples of a shard, usable or not. Only texts are read: pictures and latents are empty.

    A link to a file outside of the shard becomes the member "__link__".
    """
    links, contents = Links(file), []
    for sample in islice(samples(file, rules.needs, rules.text_extensions), LOOKED_AT):
        content: Sample = {"__key__": sample.key}
        for extension, member in sample.members.items():
            is_text = extension not in (*rules.needs, *LATENTS, *IMAGES)
            value = links.content(member, None if is_text else 0)
            if value is None:
                content["__link__"] = b""
            else:
                content[extension] = value
        contents.append(content)
    return contents


def extensions_of(first: Sequence[Sample]) -> set[str]:
    """Return the extensions of all members of the samples."""
    return {extension for sample in first for extension in sample if not extension.startswith("__")}


def shard_flaw(title: str, first: Sequence[Sample], rules: Rules, option: str) -> str | None:
    """Return the reason if a shard's captions cannot be read, else None. Raises UserError for shards of another kind.

    title: the shard's name for messages. first: its first samples. option: the configuration key of the shards.
    """
    extensions, texts = extensions_of(first), rules.text_extensions
    contents = f"its samples hold {', '.join(sorted(extensions)[:SHOWN])}" + ", ..." * (len(extensions) > SHOWN)
    hint = advice({"link": 1}) if any("__link__" in sample for sample in first) else ""
    captions: list[dict[str, list[str]] | Skip] = []
    for sample in first:
        try:
            captions = [captions_of(sample, rules.captions)]
            break
        except Skip as skip:
            captions.append(skip)
    readable = any(not isinstance(caption, Skip) for caption in captions)
    if extensions & set(texts) and extensions & set(rules.needs) and not readable:
        return f"{title} has no captions that can be read ({captions[0]})"
    if not extensions & set(rules.needs):
        if extensions & set(LATENTS):
            raise UserError(f"{title} holds latents, not pictures: set {option} to shards of pictures")
        if rules.needs != IMAGES and extensions & set(IMAGES):
            raise UserError(f"{title} holds pictures, not latents: encode it with python -m lcm.encode, or choose data=shards")
        raise UserError(f"{title} has no images: {contents}, expected one of {', '.join(rules.needs)}{hint}")
    if not extensions & set(texts):
        raise UserError(
            f"{title} has no captions: {contents}, expected one of {', '.join(texts)}, or others by data.captions{hint}"
        )
    return None
