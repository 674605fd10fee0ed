"""Adapters (LoRA) on a network with frozen weights: added, merged, and saved in diffusers' format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lcm.core.errors import UserError
from lcm.models.families import Family
from lcm.models.loading import check_saved
from lcm.models.student import copy_sharing

NAME = "default"  # name of a single adapter in peft and diffusers


def with_adapters(
    family: Family, net: Any, *, rank: int, alpha: int | None = None, target_modules: Sequence[str] | None = None
) -> Any:
    """Return a network with trainable adapters that shares the frozen weights of `net`.

    A layer with adapters computes `W x + alpha / rank * B A x`, where A has `rank` rows. B starts at zero, so the network
    starts equal to `net`. alpha: None uses the rank. target_modules: suffixes of layer names; None uses the family's.
    """
    if family.lora_mixin is None:
        raise UserError(f"model.adapters: diffusers has no adapters for {family.pipelines[0]}: set model.adapters=null")
    if rank < 1:
        raise UserError(f"model.adapters.rank={rank} is not a rank: use 1 or more")
    targets = list(family.lora_targets if target_modules is None else target_modules)
    adapted = copy_sharing(net, net.parameters())
    try:
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=targets), NAME)
    except ValueError as error:
        raise UserError(f"model.adapters.target_modules: {error}") from error
    return adapted


def is_adapted(network: Any) -> bool:
    return bool(getattr(network, "peft_config", None))


def is_kept(name: str) -> bool:
    """Return whether a checkpoint of adapters holds the tensor of this name: an adapter's A or B, or an adversary's."""
    return ".lora_" in name or name.startswith("adversary.")


def merged(network: Any, base: Any) -> Any:
    """Add `alpha / rank * B A` of `network` to the weights of `base`, in place, and return `base`.

    base: the same network in float32, since the frozen weights of `network` may be bfloat16. It gets the `sample_size` of
    `network`.
    """
    base.add_adapter(network.peft_config[NAME], NAME)
    set_peft_model_state_dict(base, get_peft_model_state_dict(network), NAME)
    base.fuse_lora()
    base.unload_lora()
    base.register_to_config(sample_size=network.config["sample_size"])
    return base


def save_adapters(folder: Path, network: Any, family: Family, dtype: torch.dtype) -> None:
    """Write `folder/pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`.

    B is multiplied by `alpha / rank`, so that readers need no alpha. The names are peft's: diffusers' conversion renames only
    attention layers, and its loader would then ignore them.
    """
    config = network.peft_config[NAME]
    scales = {"lora_A": 1.0, "lora_B": config.lora_alpha / config.r}
    scaled = {name: value * scales[name.split(".")[-2]] for name, value in get_peft_model_state_dict(network).items()}
    state = {name: value.to(dtype).contiguous() for name, value in scaled.items()}
    check_saved(state, scaled)
    family.lora_mixin.save_lora_weights(folder, **{f"{family.network}_lora_layers": state})


def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Remove the networks' frozen weights from a state dict (a post hook of `state_dict`)."""
    for name in [name for name in state if not is_kept(name)]:
        del state[name]


def ignore_missing_frozen(module: nn.Module, keys: Any) -> None:
    """Accept a state dict without frozen weights (a post hook of `load_state_dict`)."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if is_kept(name)]
