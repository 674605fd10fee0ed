"""Adapters (LoRA) on a UNet whose own weights stay: added, merged into them, saved as diffusers loads them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from lcm.errors import UserError
from lcm.models.parts import check_saved
from lcm.models.student import sharing

NAME = "default"  # peft's and diffusers' name of an only adapter
TARGETS = (  # LCM-LoRA's, as in diffusers' script: every linear layer and convolution of the blocks
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


def with_adapters(
    net: UNet2DConditionModel, *, rank: int, alpha: int, target_modules: Sequence[str] = TARGETS
) -> UNet2DConditionModel:
    """A UNet of the same weights as `net`, not copied and frozen in both, and trainable adapters of its own.

    A layer that adapters are on computes `W x + alpha / rank * B A x`, A with `rank` rows; B starts at zero, so that the result
    starts as `net`. target_modules: the ends of the layers' names.
    """
    if rank < 1:
        raise UserError(f"model.rank={rank} is not a rank: give 1 or more")
    adapted = sharing(net, net.parameters())
    try:
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules)), NAME)
    except ValueError as error:
        raise UserError(f"model.target_modules: {error}") from error
    return adapted


def is_adapted(unet: UNet2DConditionModel) -> bool:
    return bool(getattr(unet, "peft_config", None))


def is_of_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an A or B."""
    return ".lora_" in name


def merged(unet: UNet2DConditionModel, base: UNet2DConditionModel) -> UNet2DConditionModel:
    """`base` with `alpha / rank * B A` of `unet` added to its weights, in place: those of `unet` may be rounded to bfloat16.

    It is given the `sample_size` of `unet`, which may have been trained at another size.
    """
    base.add_adapter(unet.peft_config[NAME], NAME)
    set_peft_model_state_dict(base, get_peft_model_state_dict(unet), NAME)
    base.fuse_lora()
    base.unload_lora()
    base.register_to_config(sample_size=unet.config["sample_size"])
    return base


def save_adapters(folder: Path, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """`folder/pytorch_lora_weights.safetensors`, as diffusers loads it; B times `alpha / rank`: no reader needs to know alpha.

    The names are peft's throughout: diffusers' conversion renames attention's alone and its loader then leaves those out.
    """
    config = unet.peft_config[NAME]
    scales = {"lora_A": 1.0, "lora_B": config.lora_alpha / config.r}
    scaled = {name: value * scales[name.split(".")[-2]] for name, value in get_peft_model_state_dict(unet).items()}
    state = {name: value.to(dtype).contiguous() for name, value in scaled.items()}
    check_saved(state, scaled)
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=state)
