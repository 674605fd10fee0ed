"""The frozen VAE and text encoders: pixels and captions in, `(z0, cond)` out (Algorithm 1's `D_z`)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Condition
from lcm.core.errors import NonFiniteError
from lcm.core.process import per_sample
from lcm.core.random import RankSlice, normal
from lcm.models.families import on_device
from lcm.models.text import TextEncoder


class LatentCodec:
    """Encodes batches and decodes latents with a pipeline's frozen `vae` and text encoders.

    dtype: of the VAE (None keeps it; bfloat16 halves its cost).
    chunk: images a VAE call takes at a time, which bounds its memory.
    cache: remember each sample's posterior in host memory (float16) the first time it is encoded: 4 kB a 64 px image and
        64 kB a 512 px one, so for datasets that fit and transforms without a random crop or flip.
    compile: the VAE's encoder is compiled by torch.compile, which pays in a long training on a GPU.
    """

    resolution: int | None = None  # pixels a side of the images that its pipeline's UNet was trained on, where known

    def __init__(
        self,
        vae: AutoencoderKL,
        text: TextEncoder,
        *,
        dtype: torch.dtype | None = None,
        chunk: int = 64,
        cache: bool = False,
        compile: bool = False,
    ) -> None:
        self.vae = vae.to(dtype=dtype).eval().requires_grad_(False)
        self.text, self.chunk = text, chunk
        self.cache: dict[tuple[str, int, int], Tensor] | None = {} if cache else None
        self.compile = compile
        if compile:
            self.vae.encoder.compile()
        self.lay_out()

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side."""
        return vae_factor(self.vae.config)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: torch.device | str) -> "LatentCodec":
        self.vae.to(device)
        self.lay_out()
        self.text.to(device)
        return self

    def lay_out(self) -> None:
        """channels_last where that is faster: on a CPU, and compiled on a GPU, whose eager group norm gives it up."""
        on_cpu = self.device.type == "cpu"
        for part, pays in ((self.vae.encoder, on_cpu or self.compile), (self.vae.decoder, on_cpu)):
            part.to(memory_format=torch.channels_last if pays else torch.contiguous_format)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], rng: RankSlice | torch.Generator | None = None) -> LatentBatch:
        """batch: `{"x": uint8 or [-1, 1] float [B, 3, H, W], "captions", "keys"}`, or "moments" `[B, 2C, h, w]` in place of x,
        and optionally the captions' embeddings by the family's names, and "original_sizes", "crops" `[B, 2]`.

        Returns a LatentBatch; rng draws the posterior.
        """
        moments = batch["moments"].float() if "moments" in batch else self.posterior(batch["x"], batch["keys"])
        mean, std = moments.chunk(2, dim=1)
        shift, scale = self.text.family.latent_scaling(self.vae)
        z0 = (mean + std * normal(mean.shape, rng, mean.device) - shift) * scale
        return LatentBatch(z0, *self.conditions(batch["captions"], z0, batch), batch["captions"], batch["keys"])

    def conditions(
        self, captions: list[str], z: Tensor, batch: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Condition, Condition]:
        """Return the conditions of `[B]` latents z with these captions, and the condition of the empty caption, one row.

        batch: may hold the captions' embeddings, see `encode`.
        """
        family = self.text.family
        if all(name in batch for name in family.text):
            uncond, captioned = self.text([""]), on_device(torch.tensor([caption != "" for caption in captions]), z.device)
            # A dropped caption has the empty caption's embeddings.
            stored = {name: batch[name].float() for name in family.text}
            cond = {name: torch.where(per_sample(captioned, rows.ndim), rows, uncond[name]) for name, rows in stored.items()}
        else:
            both = self.text([*captions, ""])
            cond = {name: rows[:-1] for name, rows in both.items()}
            uncond = {name: rows[-1:] for name, rows in both.items()}
        if family.takes_sizes:
            cond["sizes"] = uncond["sizes"] = self.sizes(z, batch)
        return cond, uncond

    def sizes(self, z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return `[B, 6]`: original size, crop and target size of the batch, or those of whole images of just this size."""
        target = torch.stack([torch.full((len(z),), side * self.factor, device=z.device) for side in z.shape[2:]], dim=1)
        return torch.cat([batch.get("original_sizes", target), batch.get("crops", torch.zeros_like(target)), target], dim=1)

    def posterior(self, x: Tensor, keys: list[str] | None = None) -> Tensor:
        """Mean and standard deviation of q(z|x), unscaled: `[B, 2C, H/f, W/f]` float32; remembered by key, if at all."""
        names = [(key, *x.shape[2:]) for key in keys or ()]
        if self.cache is not None and names and all(name in self.cache for name in names):
            return torch.stack([self.cache[name] for name in names]).to(self.device).float()
        parts = []
        for part in x.split(self.chunk):
            q = self.vae.encode(to_signed_range(part).to(self.vae.dtype)).latent_dist
            parts.append(torch.cat([q.mean, q.std], dim=1).float().contiguous())
        moments = torch.cat(parts)
        if self.cache is not None and names:
            moments = moments.half().float()  # as the cache will give them: a resumed run has yet to fill it
            self.cache.update(zip(names, moments.half().cpu(), strict=True))
        return moments

    @torch.no_grad()
    def decode(self, z0: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> images uint8 `[B, 3, H, W]`. Raises NonFiniteError."""
        shift, scale = self.text.family.latent_scaling(self.vae)
        images = []
        for part in z0.split(self.chunk):
            x = self.vae.decode((part / scale + shift).to(self.vae.dtype)).sample
            if not x.isfinite().all():
                what, network = ("images", "VAE") if part.isfinite().all() else ("latents", "UNet")
                raise NonFiniteError(
                    f"the drawn {what} are not finite: the {network}'s weights are damaged, or they overflow in float16; draw "
                    "in float32, or give another model"
                )
            images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().contiguous())
        return torch.cat(images)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent cell along a side, by the VAE's configuration."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def to_signed_range(x: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]; a float tensor is returned as it is."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
