"""Pipeline folders in Stable Diffusion's format, written."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel

from lcm.core.schedule import NoiseSchedule
from lcm.core.timesteps import POINTS
from lcm.models.lora import is_adapted, merged, save_adapters
from lcm.models.pipeline import OF_XL, find, is_xl, load_unet, zero_null


def save_unet(folder: str | Path, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float16) -> None:
    torch.nn.Module.to(copy.deepcopy(unet), dtype).save_pretrained(folder)


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
    for part in ("vae", "text_encoder", "tokenizer", *OF_XL, "clip"):
        if (source / part).is_dir():
            shutil.copytree(source / part, partial / part)
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
