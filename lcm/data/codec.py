"""The frozen VAE and text encoder: pixels and captions in, `(z0, cond)` out (Algorithm 1's `D_z`)."""

from collections import OrderedDict
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lcm.core.batch import LatentBatch
from lcm.core.random import own_rows


class LatentCodec:
    """Encodes batches and decodes latents with a pipeline's frozen `vae`, `text_encoder` and `tokenizer`.

    dtype: of the frozen networks (None keeps float32; bfloat16 halves their cost).
    chunk: images a VAE call takes at a time, which bounds its memory.
    cache: remember each sample's posterior in host memory (float16) the first time it is encoded: 4 kB a 64 px image and
        64 kB a 512 px one, so for datasets that fit and transforms without a random crop or flip.
    text_cache: megabytes of text states to remember on the device, those of the captions used last: 6 kB a caption of the mini
        model, 118 kB one of SD 1.5 (bfloat16).
    compile: the VAE's encoder is compiled by torch.compile, which pays in a long training on a GPU.
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
        text_cache: float = 256,
        compile: bool = False,
    ) -> None:
        self.vae = vae.to(dtype=dtype).eval().requires_grad_(False)
        self.text_encoder = text_encoder.to(dtype=dtype).eval().requires_grad_(False)
        self.tokenizer, self.chunk = tokenizer, chunk
        self.cache: dict[tuple[str, int, int], Tensor] | None = {} if cache else None
        self.text_cache = text_cache
        self.texts: OrderedDict[str, Tensor] = OrderedDict()
        self.compile = compile
        if compile:
            self.vae.encoder.compile()

    @property
    def factor(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: torch.device | str) -> "LatentCodec":
        self.vae.to(device)
        if self.compile and self.device.type == "cuda":  # the eager decoder would lose by this layout
            self.vae.encoder.to(memory_format=torch.channels_last)
        self.text_encoder.to(device)
        self.texts = OrderedDict((caption, states.to(device)) for caption, states in self.texts.items())
        return self

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], rng: torch.Generator | None = None, world: tuple[int, int] = (0, 1)) -> LatentBatch:
        """batch: `{"x": uint8 or [-1, 1] float [B, 3, H, W], "captions", "keys"}`, or "moments" `[B, 2C, h, w]` in place of x,
        and possibly "text" `[B, L, D]`, the captions' states.

        Returns a LatentBatch; rng draws the posterior, for all ranks; world: (this one, of how many).
        """
        moments = batch["moments"].float() if "moments" in batch else self.posterior(batch["x"], batch["keys"])
        mean, std = moments.chunk(2, dim=1)
        noise = own_rows(torch.randn(world[1] * len(mean), *mean.shape[1:], generator=rng, device=mean.device), *world)
        z0 = (mean + std * noise) * self.vae.config["scaling_factor"]
        captions = batch["captions"]
        if "text" not in batch:
            states = self.encode_text([*captions, ""])
            return LatentBatch(z0, states[:-1], states[-1:], captions, batch["keys"])
        uncond, said = self.uncond, torch.tensor([caption != "" for caption in captions], device=z0.device)
        cond = torch.where(said[:, None, None], batch["text"].float(), uncond)  # a dropped caption has the null prompt's states
        return LatentBatch(z0, cond, uncond, captions, batch["keys"])

    def posterior(self, x: Tensor, keys: list[str] | None = None) -> Tensor:
        """Mean and standard deviation of q(z|x), unscaled: `[B, 2C, H/f, W/f]` float32; remembered by key, if at all."""
        names = [(key, *x.shape[2:]) for key in keys or ()]
        if self.cache is not None and names and all(name in self.cache for name in names):
            return torch.stack([self.cache[name] for name in names]).to(self.device).float()
        parts = []
        for part in x.split(self.chunk):
            q = self.vae.encode(to_unit_range(part).to(self.vae.dtype)).latent_dist
            parts.append(torch.cat([q.mean, q.std], dim=1).float())
        moments = torch.cat(parts)
        if self.cache is not None and names:
            moments = moments.half().float()  # as the cache will give them: a resumed run has yet to fill it
            self.cache.update(zip(names, moments.half().cpu(), strict=True))
        return moments

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """`[B, L, D]` float32 text states, captions cut to the text tower's length (EOS kept); each one not remembered is
        encoded, once."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.texts]
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for caption, states in zip(new, self.text_encoder(ids.to(self.device))[0], strict=True):
                self.texts[caption] = states.clone()  # a view would keep all of its batch
        for caption in captions:
            self.texts.move_to_end(caption)
        batch = torch.stack([self.texts[caption] for caption in captions])
        while len(self.texts) * batch[0].nbytes > self.text_cache * 1e6:
            self.texts.popitem(last=False)
        return batch.float()

    @property
    def uncond(self) -> Tensor:
        """`[1, L, D]` float32 text states of the null prompt."""
        return self.encode_text([""])

    @torch.no_grad()
    def decode(self, z0: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> images uint8 `[B, 3, H, W]`."""
        images = []
        for part in z0.split(self.chunk):
            x = self.vae.decode((part / self.vae.config["scaling_factor"]).to(self.vae.dtype)).sample
            images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte())
        return torch.cat(images)


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]; a float tensor is returned as it is."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
