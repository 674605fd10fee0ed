"""Shards whose images were encoded once (`python -m lcm.encode`): posterior moments in place of pixels."""

import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import torch
from diffusers import AutoencoderKL

from lcm.data.members import CaptionChoice, Sample, Skip, skipping
from lcm.data.shards import local, redacted
from lcm.errors import UserError

LATENT = "latent.npy"
STAMP = "latents.json"


class DecodeLatents:
    """`sample -> {"moments": float16 [2C, h, w], "caption", "key"}`: mean and standard deviation of q(z|x), unscaled.

    A member `latent.npy` is `[V, 2C, h, w]`: V crops or mirrored copies, of which one is drawn.
    """

    needs = (LATENT,)

    def __init__(self, *, caption_dropout: float = 0.0, captions: Mapping[str, float] | None = None) -> None:
        self.choose = CaptionChoice(caption_dropout, captions)

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        with skipping("latent", ValueError, EOFError, OSError):
            variants = array(sample[LATENT])
        if variants.ndim != 4 or not np.isfinite(variants).all():
            raise Skip("latent", f"shape {variants.shape}, or not finite")
        moments = variants[rng.randrange(len(variants)) if len(variants) > 1 else 0]
        return {
            "moments": torch.from_numpy(moments.copy()),
            "caption": self.choose(sample, rng),
            "key": f"{sample['__url__']}/{sample['__key__']}",
        }


def array(content: bytes) -> np.ndarray:
    """What `np.load` gives, read-only and in half its time: it would parse the same header again for each sample."""
    start = 10 + int.from_bytes(content[8:10], "little")
    shape, dtype = header(content[:start])
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


@lru_cache(64)
def header(head: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a .npy file of format 1.0, all that `np.save` writes of plain numbers. Raises ValueError."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of format 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject:
        raise ValueError("not plain numbers in C order")
    return shape, dtype


def collate_latents(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """`{"moments": float16 [B, 2C, h, w], "captions": list[str], "keys": list[str]}`."""
    return {
        "moments": torch.stack([sample["moments"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "keys": [sample["key"] for sample in samples],
    }


def stamp(vae: AutoencoderKL, resolution: int) -> dict[str, Any]:
    """What latents depend on: another VAE, size or convention makes others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        # In bfloat16, so that the hash is the same whether the weights were loaded in float32, float16 or bfloat16.
        digest.update(name.encode() + tensor.cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return {"vae": digest.hexdigest(), "resolution": resolution, "content": "posterior mean and std, unscaled, float16"}


def check_stamp(urls: Sequence[str], expected: Mapping[str, Any]) -> None:
    """Refuse latents that were not made by this VAE at this size. Raises UserError."""
    for folder in sorted({local(url).rpartition("/")[0] or "." for url in urls}):
        try:
            with fsspec.open(f"{folder}/{STAMP}", "r") as file:
                found = json.load(file)
        except Exception as error:  # whatever a file system's client raises
            raise UserError(
                f"{redacted(folder)} has no readable {STAMP}: make latent shards with python -m lcm.encode"
            ) from error
        for name, value in expected.items():
            if found.get(name) != value:
                raise UserError(
                    f"the latents in {redacted(folder)} have {name} = {found.get(name)}, but data.codec and data.resolution "
                    f"ask for {value}: encode the images again, or set what they were encoded with"
                )
