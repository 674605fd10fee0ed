"""The frozen VAE and text encoders, which map pixels and captions to `(z0, cond)` (Algorithm 1's `D_z`)."""

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

    dtype: the dtype of the VAE; None keeps its own. bfloat16 halves the cost of the VAE.
    chunk: images per VAE call, which bounds the VAE's memory.
    cache: cache each sample's posterior in host memory (float16): 4 kB per 64 px image, 64 kB per 512 px image. The dataset
        must fit, and transforms must not crop or flip at random.
    compile: compile the VAE's encoder, which pays off in long trainings on a GPU.
    """

    resolution: int | None = None  # pixels per side of the training images of the pipeline's network; None: unknown

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
        self.set_memory_format()

    @property
    def factor(self) -> int:
        """Return the VAE's downsampling factor."""
        return vae_factor(self.vae.config)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: torch.device | str) -> "LatentCodec":
        self.vae.to(device)
        self.set_memory_format()
        self.text.to(device)
        return self

    def place(self, device: torch.device, batch: Mapping[str, Any]) -> None:
        """Move the networks that encode this batch to the device, and the other networks to host memory.

        A batch of latents needs no VAE. A batch with text embeddings needs no text encoders.
        """
        vae_device = torch.device("cpu") if "moments" in batch else device
        if self.vae.device != vae_device:
            self.vae.to(vae_device)
            self.set_memory_format()
        text_device = torch.device("cpu") if self.has_text(batch) else device
        if self.text.device != text_device:
            self.text.to(text_device)

    def has_text(self, batch: Mapping[str, Any]) -> bool:
        """Return whether the batch holds the text embeddings of its captions."""
        return all(name in batch for name in self.text.family.text)

    def set_memory_format(self) -> None:
        """Use channels_last on a CPU, and for a compiled encoder. CUDA's eager group norm does not keep this format."""
        on_cpu = self.device.type == "cpu"
        for module, faster in ((self.vae.encoder, on_cpu or self.compile), (self.vae.decoder, on_cpu)):
            module.to(memory_format=torch.channels_last if faster else torch.contiguous_format)

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], rng: RankSlice | torch.Generator | None = None) -> LatentBatch:
        """Encode a batch. rng: the generator of the posterior's noise.

        batch: "captions" and "keys", lists of B, and "x" `[B, 3, H, W]` (uint8, or float in [-1, 1]) or "moments"
        `[B, 2C, h, w]`. Optional: text embeddings by the family's names, and "original_sizes", "crops" `[B, 2]`.
        """
        moments = batch["moments"].float() if "moments" in batch else self.posterior(batch["x"], batch["keys"])
        mean, std = moments.chunk(2, dim=1)
        shift, scale = self.text.family.latent_scaling(self.vae)
        z0 = (mean + std * normal(mean.shape, rng, mean.device) - shift) * scale
        return LatentBatch(z0, *self.conditions(batch["captions"], z0, batch), batch["captions"], batch["keys"])

    def conditions(
        self, captions: list[str], z: Tensor, batch: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Condition, Condition]:
        """Return the condition of these B captions, and the condition of the empty caption, one row.

        z: the latents `[B, C, h, w]`. batch: may hold the text embeddings of the captions, see `encode`.
        """
        family = self.text.family
        if self.has_text(batch):
            uncond = self.text([""], z.device)
            captioned = on_device(torch.tensor([caption != "" for caption in captions]), z.device)
            # A batch holds the embeddings of the full captions, but caption dropout makes some captions empty.
            stored = {name: batch[name].float() for name in family.text}
            cond = {name: torch.where(per_sample(captioned, rows.ndim), rows, uncond[name]) for name, rows in stored.items()}
        else:
            embeddings = self.text([*captions, ""], z.device)
            cond = {name: rows[:-1] for name, rows in embeddings.items()}
            uncond = {name: rows[-1:] for name, rows in embeddings.items()}
        if family.takes_sizes:
            cond["sizes"] = uncond["sizes"] = self.sizes(z, batch)
        return cond, uncond

    def sizes(self, z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return original size, crop and target size, `[B, 6]` int64. By default an image is neither resized nor cropped."""
        target = torch.stack([torch.full((len(z),), side * self.factor, device=z.device) for side in z.shape[2:]], dim=1)
        return torch.cat([batch.get("original_sizes", target), batch.get("crops", torch.zeros_like(target)), target], dim=1)

    def posterior(self, x: Tensor, keys: list[str] | None = None) -> Tensor:
        """Return mean and standard deviation of q(z|x), unscaled, `[B, 2C, H/f, W/f]` float32. keys: names in the cache."""
        cache_keys = [(key, *x.shape[2:]) for key in keys or ()]
        if self.cache is not None and cache_keys and all(key in self.cache for key in cache_keys):
            return torch.stack([self.cache[key] for key in cache_keys]).to(self.device).float()
        chunks = []
        for pixels in x.split(self.chunk):
            q = self.vae.encode(to_signed_range(pixels).to(self.vae.dtype)).latent_dist
            chunks.append(torch.cat([q.mean, q.std], dim=1).float().contiguous())
        moments = torch.cat(chunks)
        if self.cache is not None and cache_keys:
            moments = moments.half().float()  # equal to a cached posterior: a resumed run starts with an empty cache
            self.cache.update(zip(cache_keys, moments.half().cpu(), strict=True))
        return moments

    @torch.no_grad()
    def encode_mean(self, x: Tensor) -> Tensor:
        """Return the mean latents `[B, C, h, w]` of pixels `[B, 3, H, W]` (uint8, or float in [-1, 1])."""
        shift, scale = self.text.family.latent_scaling(self.vae)
        return (self.posterior(x).chunk(2, dim=1)[0] - shift) * scale

    @torch.no_grad()
    def decode(self, z0: Tensor) -> Tensor:
        """Decode latents `[B, C, h, w]` to uint8 images `[B, 3, H, W]`. Raises NonFiniteError."""
        shift, scale = self.text.family.latent_scaling(self.vae)
        images = []
        for z in z0.split(self.chunk):
            x = self.vae.decode((z / scale + shift).to(self.vae.dtype)).sample
            if not x.isfinite().all():
                output, network = ("images", "VAE") if z.isfinite().all() else ("latents", "UNet")
                raise NonFiniteError(
                    f"the drawn {output} are not finite: the {network}'s weights are damaged, or overflow in float16: sample "
                    "in float32, or use another model"
                )
            images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().contiguous())
        return torch.cat(images)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return the downsampling factor of a VAE with this configuration."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def to_signed_range(x: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]. A float tensor is returned unchanged."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
