"""Stable Diffusion 3 (2403.03206): a flow-matching transformer with two CLIP text encoders and an optional T5."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from lcm.core.denoiser import Condition
from lcm.models.families import Family, Tower, tokens

T5_LENGTH = 256  # tokens per caption


class StableDiffusion3(Family):
    """Students take no w, as diffusers' pipeline could not pass it."""

    pipelines = ("StableDiffusion3Pipeline",)
    network, network_class = "transformer", SD3Transformer2DModel
    width = "joint_attention_dim"
    towers = (
        Tower("text_encoder", CLIPTextModelWithProjection, "tokenizer", CLIPTokenizer),
        Tower("text_encoder_2", CLIPTextModelWithProjection, "tokenizer_2", CLIPTokenizer),
        Tower("text_encoder_3", T5EncoderModel, "tokenizer_3", T5Tokenizer, optional=True),
    )
    text = ("states", "pooled")
    blocks = (JointTransformerBlock,)
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    lora_mixin = SD3LoraLoaderMixin

    def call(self, net: Any, forward: Callable[..., Any], z: Tensor, time: Tensor, cond: Condition, w: Tensor | None) -> Tensor:
        dtype = next(net.parameters()).dtype
        return forward(
            hidden_states=z.to(dtype),
            timestep=time,
            encoder_hidden_states=cond["states"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]

    def feature(self, output: Any) -> Tensor:
        return output[1].transpose(1, 2)  # after the text's tokens

    def encode(self, tokenizers: Sequence[Any], encoders: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        """Return "states": CLIP's embeddings, padded to T5's width, then T5's; and "pooled": CLIP's pooled embeddings.

        Without T5 its embeddings are zeros.
        """
        outputs = [
            encoder(tokens(tokenizer, captions, encoder.device)["input_ids"], output_hidden_states=True)
            for tokenizer, encoder in zip(tokenizers[:2], encoders[:2], strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        if encoders[2:]:
            ids = tokens(tokenizers[2], captions, states.device, max_length=T5_LENGTH)["input_ids"]
            t5 = encoders[2](ids)[0]
        else:
            t5 = states.new_zeros(len(captions), T5_LENGTH, self.config["joint_attention_dim"])
        padded = nn.functional.pad(states, (0, t5.shape[-1] - states.shape[-1]))
        return {"states": torch.cat([padded, t5], dim=-2), "pooled": pooled}
