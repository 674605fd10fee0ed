"""The frozen VAE and text encoder: pixels and captions in, `(z0, cond)` out (Algorithm 1's `D_z`)."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lcm.core.batch import LatentBatch


class LatentCodec:
    """Encodes batches and decodes latents with a pipeline's frozen `vae`, `text_encoder` and `tokenizer`.

    dtype: of the frozen networks (None keeps float32; bfloat16 halves their cost).
    chunk: images a VAE call takes at a time, which bounds its memory.
    cache: remember each sample's posterior in host memory (float16) the first time it is encoded: 4 kB a 64 px image and
        64 kB a 512 px one, so for datasets that fit and transforms without a random crop or flip.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        dtype: torch.dtype | None = None,
        chunk: int = 64,
        cache: bool = False,
    ) -> None:
        self.vae = vae.to(dtype=dtype).eval().requires_grad_(False)
        self.text_encoder = text_encoder.to(dtype=dtype).eval().requires_grad_(False)
        self.tokenizer, self.chunk = tokenizer, chunk
        self.cache: dict[str, Tensor] | None = {} if cache else None
        self._uncond: Tensor | None = None

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: torch.device | str) -> "LatentCodec":
        self.vae.to(device)
        self.text_encoder.to(device)
        self._uncond = None
        return self

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], rng: torch.Generator | None = None) -> LatentBatch:
        """batch: `{"x": uint8 or [-1, 1] float [B, 3, S, S], "captions", "keys"}`, or "moments" `[B, 2C, h, w]` in place of x.

        Returns a LatentBatch; rng draws the posterior.
        """
        moments = batch["moments"].float() if "moments" in batch else self.posterior(batch["x"], batch["keys"])
        mean, std = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        z0 = (mean + std * noise) * self.vae.config["scaling_factor"]
        return LatentBatch(z0, self.encode_text(batch["captions"]), self.uncond, batch["captions"], batch["keys"])

    def posterior(self, x: Tensor, keys: list[str]) -> Tensor:
        """Mean and standard deviation of q(z|x), unscaled: `[B, 2C, H/f, W/f]` float32."""
        if self.cache is not None and all(key in self.cache for key in keys):
            return torch.stack([self.cache[key] for key in keys]).to(self.device).float()
        moments = []
        for part in x.split(self.chunk):
            q = self.vae.encode(to_unit_range(part).to(self.vae.dtype)).latent_dist
            moments.append(torch.cat([q.mean, q.std], dim=1).float())
        if self.cache is not None:
            self.cache.update(zip(keys, torch.cat(moments).half().cpu(), strict=True))
        return torch.cat(moments)

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """`[B, L, D]` float32 text states, captions cut to the text tower's length (EOS kept)."""
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device))[0].float()

    @property
    def uncond(self) -> Tensor:
        if self._uncond is None:
            self._uncond = self.encode_text([""])
        return self._uncond

    @torch.no_grad()
    def decode(self, z0: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> images uint8 `[B, 3, S, S]`."""
        images = []
        for part in z0.split(self.chunk):
            x = self.vae.decode((part / self.vae.config["scaling_factor"]).to(self.vae.dtype)).sample
            images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte())
        return torch.cat(images)


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]; a float tensor is returned as it is."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
