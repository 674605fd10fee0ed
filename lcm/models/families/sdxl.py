"""Stable Diffusion XL: a UNet with the embeddings of two CLIP text encoders, a pooled embedding and the image's sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from lcm.core.denoiser import Condition
from lcm.models.families import Original, Tower, tokens
from lcm.models.families.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL (2307.01952, section 2.2). The embeddings of the empty caption are zeros by `force_zeros_for_empty_prompt`."""

    pipelines = ("StableDiffusionXLPipeline",)
    towers = (
        *StableDiffusion.towers,
        Tower("text_encoder_2", CLIPTextModelWithProjection, "tokenizer_2", CLIPTokenizer),
    )
    text = ("states", "pooled")
    takes_sizes = True
    lora_mixin = StableDiffusionXLLoraLoaderMixin

    def added(self, cond: Condition, dtype: Any) -> dict[str, Any]:
        # Sizes stay int64: bfloat16 has 8 significant bits.
        return {"added_cond_kwargs": {"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["sizes"]}}

    def encode(self, tokenizers: Sequence[Any], encoders: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        """Return both encoders' penultimate hidden states, concatenated, and the second encoder's pooled embedding."""
        outputs = [
            encoder(tokens(tokenizer, captions, encoder.device)["input_ids"], output_hidden_states=True)
            for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        ]
        embeddings = {
            "states": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "pooled": outputs[-1].text_embeds,
        }
        if "" in captions and self.index.get("force_zeros_for_empty_prompt", True):
            for rows in embeddings.values():
                rows[captions.index("")] = 0
        return embeddings

    def original(self, net: Any) -> Original | None:
        text = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
        return Original("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", text)

    def student_pipeline(self, takes_w: bool, scheduler: str) -> str:
        return "StableDiffusionXLPipeline"
