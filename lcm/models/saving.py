"""Pipeline folders in Stable Diffusion's format, written."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPModel, CLIPTokenizer

from lcm.core.schedule import NoiseSchedule
from lcm.core.timesteps import POINTS
from lcm.files import remove
from lcm.models.lora import is_adapted, merged, save_adapters
from lcm.models.parts import check_finite, check_header, read_json, rounded, weight_files
from lcm.models.pipeline import OF_XL, find, is_xl, load_unet, zero_null

PREFIX = "text_model."  # of a text encoder's weights, which transformers from 5.6 on leaves out and others need
FLAT = ("embeddings.", "encoder.", "final_layer_norm.")


def save_unet(folder: str | Path, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float16) -> None:
    rounded(unet, dtype).save_pretrained(folder)


def copy_network(source: Path, target: Path) -> None:
    """Write what is read of a network's folder, in the one file that every library looks for.

    Text encoders are opened in float32 unless another dtype is asked for, as diffusers opens the UNet and the VAE.
    """
    _, files = weight_files(source)
    for file in files:
        check_header(file)
    weights = {name: value for file in files for name, value in load_file(file).items()}
    check_finite(source, weights)
    target.mkdir(parents=True)
    config = read_json(source / "config.json")
    if "_class_name" in config:
        name = "diffusion_pytorch_model"
    else:
        name = "model"
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
        weights = {PREFIX * key.startswith(FLAT) + key: value for key, value in weights.items()}
    save_file(weights, target / f"{name}.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copymode(target / "config.json", target / f"{name}.safetensors")  # safetensors keeps others from reading it


def save_clip(folder: str | Path, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Write `folder/clip`, and its text tower and tokenizer as the pipeline's `text_encoder` and `tokenizer`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as parts:
        clip = rounded(clip, torch.float16)
        clip.save_pretrained(f"{parts}/clip")
        clip.text_model.save_pretrained(f"{parts}/text_encoder")
        tokenizer.save_pretrained(f"{parts}/tokenizer")
        for part in ("clip", "text_encoder"):
            remove(Path(folder, part))
            copy_network(Path(parts, part), Path(folder, part))
        remove(Path(folder, "tokenizer"))
        copy_tokenizer(Path(parts, "tokenizer"), Path(folder, "tokenizer"), tokenizer.model_max_length)


def copy_tokenizer(source: Path, target: Path, length: int) -> None:
    """Write a tokenizer's folder in the files that transformers 4 and 5 read, with the length that captions are cut to."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    config = read_json(file)
    config["model_max_length"] = min(config.get("model_max_length") or length, length)
    file.write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **config}, indent=2))
    if (whole := target / "tokenizer.json").is_file() and not (target / "vocab.json").is_file():
        Tokenizer.from_file(str(whole)).model.save(str(target))


def save_pipeline(
    folder: str | Path,
    unet: UNet2DConditionModel,
    schedule: NoiseSchedule,
    *,
    base: str,
    consistency: bool,
    facts: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    more: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write a pipeline folder that diffusers opens unmodified; VAE, text encoders and tokenizers are copied from `base`.

    more: further UNets' folders by the name they get in it. Adapters are merged into the UNet of `base`, and also saved by
    themselves, in the file that diffusers' `load_lora_weights` looks for.

    The folder is written beside its place and renamed, so it is whole or absent.
    """
    target, source = Path(folder), find(base, "vae", "text_encoder", "tokenizer")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for part in ("vae", "text_encoder", OF_XL[0], "clip"):
            if (source / part).is_dir():
                copy_network(source / part, partial / part)
        for text, part in (("text_encoder", "tokenizer"), OF_XL):
            if (source / part).is_dir():
                encoder = {"max_position_embeddings": 77, **read_json(source / text / "config.json")}
                copy_tokenizer(source / part, partial / part, encoder["max_position_embeddings"])
        for name, other in more.items():
            shutil.copytree(other, partial / name)
        if is_adapted(unet):
            save_adapters(partial, unet, dtype)
            unet = merged(unet, load_unet(base))
        save_unet(partial / "unet", unet, dtype)
        takes_w = unet.config["time_cond_proj_dim"] is not None
        if consistency:
            scheduler = LCMScheduler(**schedule.config, original_inference_steps=facts.get("points") or POINTS)
        else:  # steps_offset=1 is what StableDiffusionPipeline asks for; trailing spacing does not use it
            options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1}
            scheduler = DDIMScheduler(**schedule.config, **options)
        scheduler.save_pretrained(partial / "scheduler")
        index = pipeline_index(source, type(scheduler).__name__, takes_w=consistency and takes_w)
        (partial / "model_index.json").write_text(json.dumps(index, indent=2))
        (partial / "lcm.json").write_text(json.dumps(facts, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def pipeline_index(base: Path, scheduler: str, *, takes_w: bool) -> dict[str, Any]:
    """A `model_index.json`: which class of diffusers opens the folder, and of which classes its parts are."""
    index = {
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_xl(base):
        return {
            "_class_name": "StableDiffusionXLPipeline",
            **index,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": zero_null(base),
        }
    name = "LatentConsistencyModelPipeline" if takes_w else "StableDiffusionPipeline"
    return {"_class_name": name, **index, "requires_safety_checker": False, "safety_checker": [None, None]}
