"""Adapters (LoRA) on a network with frozen weights: added, merged, and saved in diffusers' or kohya's format."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from lcm.core.errors import UserError
from lcm.models.codec import LatentCodec
from lcm.models.families import Family, Original
from lcm.models.loading import check_header, check_saved
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


def is_adapter_parameter(name: str) -> bool:
    """Return whether the parameter of this name is an adapter's A or B."""
    return ".lora_" in name


def is_in_checkpoint(name: str) -> bool:
    """Return whether a checkpoint of adapters holds the tensor of this name: a tensor of an adapter or of an adversary."""
    return is_adapter_parameter(name) or name.startswith("adversary.")


def merge_adapters(network: Any, base: Any) -> Any:
    """Add `alpha / rank * B A` of `network` to the weights of `base`, in place, and return `base`.

    base: the same network in float32, because the frozen weights of `network` may be bfloat16. The `sample_size` of `network`
    is copied to its config.
    """
    base.add_adapter(network.peft_config[NAME], NAME)
    set_peft_model_state_dict(base, get_peft_model_state_dict(network), NAME)
    base.fuse_lora()
    base.unload_lora()
    base.register_to_config(sample_size=network.config["sample_size"])
    return base


def save_adapters(folder: Path, network: Any, family: Family, dtype: torch.dtype) -> None:
    """Write `folder/pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`.

    B is multiplied by `alpha / rank`, so that readers need no alpha. The layers have peft's names. diffusers' own names exist
    for attention layers only, and its loader would ignore a file with both.
    """
    config = network.peft_config[NAME]
    scales = {"lora_A": 1.0, "lora_B": config.lora_alpha / config.r}
    scaled = {name: value * scales[name.split(".")[-2]] for name, value in get_peft_model_state_dict(network).items()}
    state = {name: value.to(dtype).contiguous() for name, value in scaled.items()}
    check_saved(state, scaled)
    family.lora_mixin.save_lora_weights(folder, **{f"{family.network}_lora_layers": state})


def kohya_weights(network: Any) -> dict[str, Tensor]:
    """Return the adapters of a UNet by kohya's names, which ComfyUI, A1111, Forge and diffusers load.

    Each layer has `lora_down`, `lora_up` and its alpha, a scalar.
    """
    alpha = torch.tensor(float(network.peft_config[NAME].lora_alpha))
    weights: dict[str, Tensor] = {}
    for name, value in get_peft_model_state_dict(network).items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        kohya = f"lora_unet_{layer.replace('.', '_')}"
        weights[f"{kohya}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        weights[f"{kohya}.alpha"] = alpha.clone()  # safetensors refuses shared memory
    return weights


def kohya_metadata(network: Any, original: Original) -> dict[str, str]:
    """Return the header of a file of `kohya_weights`, by which programs show rank, alpha and base model."""
    config = network.peft_config[NAME]
    rank, alpha = str(config.r), str(config.lora_alpha)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha}),
        "ss_base_model_version": original.base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{original.architecture}/lora",
    }


def fuse_adapters(family: Family, net: Any, codec: LatentCodec, file: Path, weight: float) -> None:
    """Add `weight` times the adapters of a file (of diffusers, peft or kohya) to the network and the text encoders.

    file: .safetensors, or a folder with diffusers' `pytorch_lora_weights.safetensors`. Raises UserError for a file without
    adapters, and for adapters that do not fit the pipeline.
    """
    if family.lora_mixin is None:
        raise UserError(f"lora: diffusers has no adapters for {family.pipelines[0]}: leave lora out")
    file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
    if not file.is_file() or file.suffix != ".safetensors":
        reason = "is not a .safetensors file" if file.is_file() else "does not exist"
        raise UserError(f"lora: {file} {reason}: give a .safetensors file of adapters (LoRA)")
    check_header(file)
    pipeline_class = getattr(diffusers, family.pipelines[0])
    parameters = inspect.signature(pipeline_class.__init__).parameters
    parts: dict[str, Any] = {name: None for name, p in parameters.items() if p.default is p.empty and name != "self"}
    encoders = dict(zip((tower.encoder for tower in family.towers), codec.text.encoders, strict=False))
    tokenizers = dict(zip((tower.tokenizer for tower in family.towers), codec.text.tokenizers, strict=False))
    parts |= {family.network: net, "vae": codec.vae, **encoders, **tokenizers}
    pipeline = pipeline_class(**parts, **({"requires_safety_checker": False} if "safety_checker" in parts else {}))
    try:
        pipeline.load_lora_weights(file, use_safetensors=True, adapter_name=NAME)
        adapted = [name for name in pipeline._lora_loadable_modules if is_adapted(getattr(pipeline, name, None))]
        if not adapted:
            raise ValueError("no weight in it fits")
        pipeline.fuse_lora(components=adapted, lora_scale=weight)
        pipeline.unload_lora_weights()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora: {file} does not fit this {family.pipelines[0]}: {reason[:300]}") from error


def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Remove the networks' frozen weights from a state dict (a post hook of `state_dict`)."""
    for name in [name for name in state if not is_in_checkpoint(name)]:
        del state[name]


def ignore_missing_frozen(module: nn.Module, keys: Any) -> None:
    """Accept a state dict without frozen weights (a post hook of `load_state_dict`)."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if is_in_checkpoint(name)]
