"""Shards whose images were encoded once (`python -m lcm.encode`): posterior moments in place of pixels."""

import hashlib
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import torch

from lcm.core.errors import UserError
from lcm.data.sample_fields import CaptionChoice, Sample, Skip, skipping
from lcm.data.urls import LATENTS, first_of, local
from lcm.models.codec import LatentCodec
from lcm.runtime.redaction import redacted

POSTERIOR, DRAWN = LATENTS
SIZES = "sizes.npy"
TEXTS = {  # (member, dimensions) by the name of a text embedding
    "states": ("text.npy", 2),
    "mask": ("mask.npy", 1),
    "pooled": ("pooled.npy", 1),
}
CONTENT = {POSTERIOR: "posterior mean and std, unscaled, float16", DRAWN: "a sample of the posterior, unscaled, float16"}
STAMP = "latents.json"


class DecodeLatents:
    """`sample -> {"moments": float16 [2C, h, w], "caption", "key"}`: mean and standard deviation of q(z|x), unscaled.

    A member `latent.npy` is `[V, 2C, h, w]`: V crops or mirrored copies. One copy is drawn. A member `sample.npy`
    `[V, C, h, w]` is a sample of each posterior, read as a mean with standard deviation 0. A member `text.npy` adds "states",
    the float16 `[L, D]` text embeddings of the .txt member, and `pooled.npy` adds "pooled" `[P]`. A member `sizes.npy` `[V, 4]`
    adds "original_sizes" and "crops", see `transforms.collate`.
    """

    needs = LATENTS

    def __init__(self, *, caption_dropout: float = 0.0, captions: Mapping[str, float] | None = None) -> None:
        self.choose = CaptionChoice(caption_dropout, captions)

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        name = first_of(sample, self.needs)
        variants = load_array(sample, name or POSTERIOR, 4)
        number = rng.randrange(len(variants)) if len(variants) > 1 else 0
        moments = variants[number]
        sizes = sizes_of(sample, len(variants))[number] if SIZES in sample else None
        texts = {part: load_array(sample, *member) for part, member in TEXTS.items() if member[0] in sample}
        return {
            "moments": torch.from_numpy(np.concatenate([moments, np.zeros_like(moments)]) if name == DRAWN else moments),
            "caption": self.choose(sample, rng),
            "key": f"{sample['__url__']}/{sample['__key__']}",
            **{part: torch.from_numpy(states) for part, states in texts.items()},
            **({} if sizes is None else {"original_sizes": torch.from_numpy(sizes[:2]), "crops": torch.from_numpy(sizes[2:])}),
        }


def sizes_of(sample: Sample, variants: int) -> np.ndarray:
    """Return the sizes, int64 `[V, 4]`. Raises `Skip`."""
    sizes = load_array(sample, SIZES, 2)
    if sizes.shape != (variants, 4) or sizes.dtype != np.int64:
        raise Skip("latent", f"{SIZES} of shape {sizes.shape} and {sizes.dtype} for {variants} variants")
    return sizes


def load_array(sample: Sample, name: str, dims: int) -> np.ndarray:
    """Return the array of a member with `dims` axes. Raises `Skip` if it is damaged or not finite."""
    with skipping("latent", Exception):  # numpy may raise anything, even MemoryError for a header of terabytes
        content = np.load(io.BytesIO(sample[name]), allow_pickle=False)
        sound = content.ndim == dims and np.isfinite(content).all()
    if not sound:
        raise Skip("latent", f"{name} of shape {content.shape}, or not finite")
    return content


def collate_latents(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `{"moments": float16 [B, 2C, h, w], "captions": list[str], "keys": list[str]}` and the fields of all samples."""
    tensors = [name for name in samples[0] if name not in ("caption", "key") and all(name in sample for sample in samples)]
    return {
        **{name: torch.stack([sample[name] for sample in samples]) for name in tensors},
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
    }


def stamp(codec: LatentCodec, resolution: int, *, drawn: bool = False, text: bool = False) -> dict[str, Any]:
    """Return the settings that latents depend on. drawn, text: the options of `lcm.encode`."""
    settings = {"vae": weights_hash(codec.vae), "resolution": resolution, "content": CONTENT[DRAWN if drawn else POSTERIOR]}
    if not text:
        return settings
    words = [json.dumps(sorted(tokenizer.get_vocab().items())) for tokenizer in codec.text.tokenizers]
    return {**settings, "text_encoder": " ".join(map(weights_hash, codec.text.encoders, words))}


def weights_hash(network: torch.nn.Module, text: str = "") -> str:
    """Return the SHA-256 of a text and of a network's weights in bfloat16, which is equal for float32, float16 and bfloat16."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_stamp(urls: Sequence[str], codec: LatentCodec, resolution: int, captions: Mapping[str, float] | None = None) -> None:
    """Raise UserError for latents of another VAE or size, and for `captions` if text embeddings are stored.

    Stored text embeddings belong to the one caption of the encoding.
    """
    for folder in sorted({local(url).rpartition("/")[0] or "." for url in urls}):
        try:
            with fsspec.open(f"{folder}/{STAMP}") as file:
                stored = json.loads(file.read())
        except Exception as error:  # a file system's client may raise anything
            raise UserError(
                f"{redacted(folder)} has no readable {STAMP}: make latent shards with python -m lcm.encode"
            ) from error
        drawn, text = stored.get("content") == CONTENT[DRAWN], "text_encoder" in stored
        if text and captions is not None:
            raise UserError(
                f"data.captions has no effect: the latents in {redacted(folder)} hold the text embeddings of one caption per "
                "image: leave data.captions out, or encode the images again with text=false"
            )
        for name, value in stamp(codec, resolution, drawn=drawn, text=text).items():
            if stored.get(name) != value:
                raise UserError(
                    f"the latents in {redacted(folder)} have {name} = {shorten(stored.get(name))}, but data.codec and "
                    f"data.resolution ask for {shorten(value)}: encode the images again, or set what they were encoded with"
                )


def shorten(value: Any) -> str:
    """Shorten sha256 digests in error messages."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))
