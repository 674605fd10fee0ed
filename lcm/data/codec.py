"""The frozen VAE and text encoders: pixels and captions in, `(z0, cond)` out (Algorithm 1's `D_z`)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.condition import Condition
from lcm.core.random import RankRows, normal
from lcm.core.shapes import per_sample
from lcm.data.text import TextEncoder, handed_over
from lcm.errors import NonFiniteError


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
    def encode(self, batch: dict[str, Any], rng: RankRows | torch.Generator | None = None) -> LatentBatch:
        """batch: `{"x": uint8 or [-1, 1] float [B, 3, H, W], "captions", "keys"}`, or "moments" `[B, 2C, h, w]` in place of x,
        and possibly "text" `[B, L, D]` and whatever else a caption is made into; "original_sizes", "crops" `[B, 2]`.

        Returns a LatentBatch; rng draws the posterior.
        """
        moments = batch["moments"].float() if "moments" in batch else self.posterior(batch["x"], batch["keys"])
        mean, std = moments.chunk(2, dim=1)
        z0 = (mean + std * normal(mean.shape, rng, mean.device)) * self.vae.config["scaling_factor"]
        return LatentBatch(z0, *self.conditions(batch["captions"], z0, batch), batch["captions"], batch["keys"])

    def conditions(
        self, captions: list[str], z: Tensor, batch: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Condition, Condition]:
        """What a UNet is told of `[B]` latents z and their captions, and what without captions; batch: see `encode`."""
        if all(part in batch for part in self.text.parts):
            null, said = self.text([""]), handed_over(torch.tensor([caption != "" for caption in captions]), z.device)
            given = [batch[part].float() for part in self.text.parts]
            # A dropped caption has the null prompt's states.
            parts = [torch.where(per_sample(said, g.ndim), g, n) for g, n in zip(given, null, strict=True)]
        else:
            both = self.text([*captions, ""])
            parts, null = [part[:-1] for part in both], [part[-1:] for part in both]
        sizes = self.sizes(z, batch) if self.text.sized else None
        return self.text.condition(parts, sizes), self.text.condition(null, sizes)

    def sizes(self, z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """`[B, 6]`, see `SizedText`: those of the batch, or of whole pictures of just this size."""
        own = torch.stack([torch.full((len(z),), side * self.factor, device=z.device) for side in z.shape[2:]], dim=1)
        return torch.cat([batch.get("original_sizes", own), batch.get("crops", torch.zeros_like(own)), own], dim=1)

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
        images = []
        for part in z0.split(self.chunk):
            x = self.vae.decode((part / self.vae.config["scaling_factor"]).to(self.vae.dtype)).sample
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
