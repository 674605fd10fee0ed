"""Adapters (LoRA) on a UNet whose own weights stay: added, merged into them, saved as diffusers loads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lcm.core.errors import UserError
from lcm.models.families import Family
from lcm.models.loading import check_saved
from lcm.models.student import sharing

NAME = "default"  # peft's and diffusers' name of an only adapter


def with_adapters(
    family: Family, net: Any, *, rank: int, alpha: int | None = None, target_modules: Sequence[str] | None = None
) -> Any:
    """Return a network with the weights of `net`, shared and frozen in both, and trainable adapters of its own.

    A layer with adapters computes `W x + alpha / rank * B A x`, A with `rank` rows; B starts at zero, so the result starts as
    `net`. alpha: None: as rank. target_modules: the ends of the layers' names; None: the family's.
    """
    if family.lora_mixin is None:
        raise UserError(f"model.adapters: diffusers has no adapters for {family.pipelines[0]}: set model.adapters=null")
    if rank < 1:
        raise UserError(f"model.adapters.rank={rank} is not a rank: give 1 or more")
    targets = list(family.lora_targets if target_modules is None else target_modules)
    adapted = sharing(net, net.parameters())
    try:
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=targets), NAME)
    except ValueError as error:
        raise UserError(f"model.adapters.target_modules: {error}") from error
    return adapted


def is_adapted(network: Any) -> bool:
    return bool(getattr(network, "peft_config", None))


def is_of_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an A or B."""
    return ".lora_" in name


def merged(network: Any, base: Any) -> Any:
    """`base` with `alpha / rank * B A` of `network` added to its weights, in place: those of `network` may be rounded to
    bfloat16. It is given the `sample_size` of `network`, which may have been trained at another size.
    """
    base.add_adapter(network.peft_config[NAME], NAME)
    set_peft_model_state_dict(base, get_peft_model_state_dict(network), NAME)
    base.fuse_lora()
    base.unload_lora()
    base.register_to_config(sample_size=network.config["sample_size"])
    return base


def save_adapters(folder: Path, network: Any, family: Family, dtype: torch.dtype) -> None:
    """`folder/pytorch_lora_weights.safetensors`, as diffusers loads it; B times `alpha / rank`: no reader needs to know alpha.

    The names are peft's throughout: diffusers' conversion renames attention's alone and its loader then leaves those out.
    """
    config = network.peft_config[NAME]
    scales = {"lora_A": 1.0, "lora_B": config.lora_alpha / config.r}
    scaled = {name: value * scales[name.split(".")[-2]] for name, value in get_peft_model_state_dict(network).items()}
    state = {name: value.to(dtype).contiguous() for name, value in scaled.items()}
    check_saved(state, scaled)
    family.lora_mixin.save_lora_weights(folder, **{f"{family.network}_lora_layers": state})


def leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if not is_of_adapter(name)]:
        del state[name]


def expect_no_frozen(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if is_of_adapter(name)]
