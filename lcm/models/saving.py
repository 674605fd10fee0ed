"""Saving of pipeline folders that diffusers opens."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPModel, CLIPTokenizer

from lcm.models.families import Family
from lcm.models.loading import CLIP_TYPES, cast_copy, check_finite, check_header, load_part, read_json, weight_files
from lcm.models.lora import is_adapted, merge_adapters, save_adapters
from lcm.runtime.atomic_io import remove, whole_folder

PREFIX = "text_model."  # of a text encoder's weights: transformers 5.6 omits it, older versions and ComfyUI need it
FLAT = ("embeddings.", "encoder.", "final_layer_norm.")


def save_network(folder: str | Path, network: Any, dtype: torch.dtype = torch.float16) -> None:
    """Write a network's folder in this dtype. Raises UserError for weights that are not finite in it."""
    cast_copy(network, dtype).save_pretrained(folder)
    file = Path(folder, "config.json")
    file.write_text(json.dumps(without_origin(read_json(file)), indent=2))


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's config without the folder of its weights, which belongs to one machine."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def copy_network(source: Path, target: Path) -> None:
    """Copy a network's config and weights, with all weights in the one file that every library looks for.

    The config of a text encoder names float32 as its dtype, so that it loads in the same dtype as UNet and VAE by default.
    """
    _, files = weight_files(source)
    for file in files:
        check_header(file)
    weights = {name: value for file in files for name, value in load_file(file).items()}
    check_finite(source, weights)
    target.mkdir(parents=True)
    config = without_origin(read_json(source / "config.json"))
    if "_class_name" in config:
        name = "diffusion_pytorch_model"
    else:
        name = "model"
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
        if config.get("model_type") in CLIP_TYPES:
            weights = {PREFIX * key.startswith(FLAT) + key: value for key, value in weights.items()}
    save_file(weights, target / f"{name}.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copymode(target / "config.json", target / f"{name}.safetensors")  # safetensors' files are private


def save_clip(folder: str | Path, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Write `folder/clip`, and CLIP's text encoder and tokenizer as `folder/text_encoder` and `folder/tokenizer`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as parts:
        clip = cast_copy(clip, torch.float16)
        clip.save_pretrained(f"{parts}/clip")
        clip.text_model.save_pretrained(f"{parts}/text_encoder")
        tokenizer.save_pretrained(f"{parts}/tokenizer")
        for part in ("clip", "text_encoder"):
            remove(Path(folder, part))
            copy_network(Path(parts, part), Path(folder, part))
        remove(Path(folder, "tokenizer"))
        copy_tokenizer(Path(parts, "tokenizer"), Path(folder, "tokenizer"), tokenizer.model_max_length)


def copy_tokenizer(source: Path, target: Path, length: int) -> None:
    """Copy a tokenizer with the files that transformers 4 and 5 read. length: maximal number of tokens of a caption."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    config = read_json(file)
    config["model_max_length"] = min(config.get("model_max_length") or length, length)
    file.write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **config}, indent=2))
    if (fast := target / "tokenizer.json").is_file() and not (target / "vocab.json").is_file():
        Tokenizer.from_file(str(fast)).model.save(str(target))


def save_pipeline(
    folder: str | Path,
    network: Any,
    *,
    family: Family,
    base: Path,
    scheduler: tuple[str, dict[str, Any]],
    metadata: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    extra_networks: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write a pipeline folder that diffusers opens unmodified: a copy of `base` with another network and scheduler.

    scheduler: diffusers' class name and config. metadata: the content of `lcm.json`. extra_networks: folders to copy, by name
    in the pipeline. Adapters are merged into the network of `base`, and also saved in the file that diffusers'
    `load_lora_weights` looks for. The folder is written under another name and renamed, so an incomplete one never exists.
    """
    with whole_folder(Path(folder)) as partial:
        for part in ("vae", *(tower.encoder for tower in family.towers), "clip"):
            if (base / part).is_dir():
                copy_network(base / part, partial / part)
        for tower in family.towers:
            if tower.tokenizer_class is CLIPTokenizer and (base / tower.tokenizer).is_dir():
                encoder = {"max_position_embeddings": 77, **read_json(base / tower.encoder / "config.json")}
                copy_tokenizer(base / tower.tokenizer, partial / tower.tokenizer, encoder["max_position_embeddings"])
            elif (base / tower.tokenizer).is_dir():
                shutil.copytree(base / tower.tokenizer, partial / tower.tokenizer)
        for name, source in extra_networks.items():
            shutil.copytree(source, partial / name)
        if is_adapted(network):
            save_adapters(partial, network, family, dtype)
            network = merge_adapters(network, load_part(family.network_class, base / family.network, torch_dtype=torch.float32))
        save_network(partial / family.network, network, dtype)
        name, config = scheduler
        getattr(diffusers, name)(**config).save_pretrained(partial / "scheduler")
        index = {**read_json(base / "model_index.json"), "scheduler": ["diffusers", name]}
        if metadata["sampler"] != "ddim":
            index["_class_name"] = family.student_pipeline(family.takes_w(network), name)
        (partial / "model_index.json").write_text(json.dumps(index, indent=2))
        (partial / "lcm.json").write_text(json.dumps(metadata, indent=2))
