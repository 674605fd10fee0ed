"""Stable Diffusion 1 and 2, and their latent consistency models: a UNet with the embeddings of one CLIP text encoder."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lcm.core.denoiser import Condition
from lcm.core.guidance import W_DIM, embed_w
from lcm.models.families import Family, Original, Tower, network_like, tokens


class StableDiffusion(Family):
    """Students take w through `time_embedding.cond_proj`, like released latent consistency models."""

    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network, network_class = "unet", UNet2DConditionModel
    width = "cross_attention_dim"
    towers: ClassVar[Sequence[Tower]] = (Tower("text_encoder", CLIPTextModel, "tokenizer", CLIPTokenizer),)
    blocks = (BasicTransformerBlock, ResnetBlock2D, Downsample2D, Upsample2D)
    lora_targets = (  # every linear layer and convolution of the blocks, as in diffusers' LCM-LoRA script
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    lora_mixin = StableDiffusionLoraLoaderMixin

    def call(self, net: Any, forward: Callable[..., Any], z: Tensor, time: Tensor, cond: Condition, w: Tensor | None) -> Tensor:
        dtype, dim = next(net.parameters()).dtype, net.config["time_cond_proj_dim"]  # net.dtype walks over all modules
        options = {"timestep_cond": None if w is None or dim is None else embed_w(w, dim).to(dtype), "return_dict": False}
        return forward(z.to(dtype), time, cond["states"].to(dtype), **options, **self.added(cond, dtype))[0]

    def added(self, cond: Condition, dtype: Any) -> dict[str, Any]:
        """Return further arguments of the network."""
        return {}

    def encode(self, tokenizers: Sequence[Any], encoders: Sequence[Any], captions: list[str]) -> dict[str, Tensor]:
        [encoder] = encoders
        return {"states": encoder(tokens(tokenizers[0], captions, encoder.device)["input_ids"])[0]}

    def embedding_width(self, configs: Sequence[dict[str, Any]]) -> int | None:
        return sum(config.get("hidden_size", 0) for config in configs) or None

    def takes_w(self, net: Any) -> bool:
        return net.config["time_cond_proj_dim"] is not None

    def with_w(self, net: Any, *, zero_init: bool = True) -> Any:
        dim = net.config["time_cond_proj_dim"]
        student = network_like(net, time_cond_proj_dim=dim or W_DIM)
        if dim is None and zero_init and student.device.type != "meta":
            nn.init.zeros_(student.time_embedding.cond_proj.weight)
        return student

    def w_projection(self, net: Any) -> nn.Parameter | None:
        return getattr(net.time_embedding.cond_proj, "weight", None)

    @torch.no_grad()
    def at_w(self, net: Any, w: float) -> Any:
        """Return a copy without the input for w. The first layer is linear, so the term of w is added to its bias."""
        fixed, embedding = copy.deepcopy(net), embed_w(torch.tensor([w]), net.config["time_cond_proj_dim"]).to(net.device)
        layer, projection = fixed.time_embedding.linear_1, fixed.time_embedding.cond_proj
        layer.bias += (projection(embedding.to(layer.weight.dtype)) @ layer.weight.T)[0]
        fixed.time_embedding.cond_proj = None
        fixed.register_to_config(time_cond_proj_dim=None)
        return fixed

    def original(self, net: Any) -> Original | None:
        if net.config["cross_attention_dim"] == 1024:
            return Original("sd_v2", "stable-diffusion-v2", ("cond_stage_model.model.",))
        return Original("sd_v1", "stable-diffusion-v1", ("cond_stage_model.transformer.",))

    def feature_blocks(self, net: Any) -> list[tuple[nn.Module, int]]:
        """Return the blocks of the encoder and the middle block."""
        widths = net.config["block_out_channels"]
        return list(zip((*net.down_blocks, net.mid_block), (*widths, widths[-1]), strict=True))

    def feature(self, output: Any) -> Tensor:
        hidden = output[0] if isinstance(output, tuple) else output  # a block of the encoder also returns skip connections
        return hidden.flatten(2)

    def student_pipeline(self, takes_w: bool, scheduler: str) -> str:
        return "LatentConsistencyModelPipeline" if takes_w and scheduler == "LCMScheduler" else "StableDiffusionPipeline"
