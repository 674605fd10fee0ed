"""Pipeline folders in Stable Diffusion's format, in and out: teachers, students and the mini model alike."""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lcm.core.schedule import NoiseSchedule
from lcm.data.codec import LatentCodec
from lcm.errors import UserError
from lcm.models.lora import is_adapted, merged, save_adapters

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
ASSETS = Path(__file__).parent.parent / "assets"


def find(pipeline: str, *parts: str) -> Path:
    """The folder of a pipeline: `mini` (shipped), a path, or a hub id `owner/name`, with the given parts in it."""
    path = ASSETS / "mini" if pipeline == "mini" else Path(pipeline)
    if not path.is_dir():
        path = download(pipeline)
    missing = [part for part in dict.fromkeys(PARTS + parts) if not (path / part).is_dir()]
    if set(missing) & set(parts or PARTS):
        raise UserError(
            f"{pipeline} is not a Stable Diffusion pipeline folder: it lacks {', '.join(missing)}; a single-file checkpoint is "
            "converted by diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
        )
    return path


def download(hub_id: str) -> Path:
    """A snapshot of a hub repository's safetensors and configs."""
    if len(hub_id.split("/")) != 2 or hub_id.startswith((".", "/")):
        raise UserError(f"there is no pipeline folder {hub_id!r}: give a folder, a hub id (owner/name), or 'mini'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*/*.safetensors", "*/*.json", "*/*.txt"]))
    except Exception as error:
        raise UserError(f"{hub_id!r} is neither a folder here nor reachable on the hub ({type(error).__name__})") from error


@contextmanager
def explained(pipeline: str) -> Iterator[None]:
    """A library's complaint about a part's files as one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"cannot load {pipeline}: {' '.join(str(error).split())}") from error


def load_unet(pipeline: str, dtype: torch.dtype = torch.float32, *, name: str = "unet") -> UNet2DConditionModel:
    folder = find(pipeline, name, "scheduler")
    with explained(pipeline):
        return UNet2DConditionModel.from_pretrained(folder, subfolder=name, use_safetensors=True, torch_dtype=dtype)


def save_unet(folder: str | Path, unet: UNet2DConditionModel, dtype: torch.dtype = torch.float16) -> None:
    torch.nn.Module.to(copy.deepcopy(unet), dtype).save_pretrained(folder)


def load_schedule(pipeline: str) -> NoiseSchedule:
    """The noise schedule and prediction type of `scheduler/scheduler_config.json`."""
    return NoiseSchedule.from_config(scheduler_config(pipeline))


def scheduler_config(pipeline: str) -> dict[str, Any]:
    file = find(pipeline, "scheduler") / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{pipeline} has no scheduler/scheduler_config.json")
    return json.loads(file.read_text())


def load_codec(pipeline: str, *, dtype: torch.dtype | str | None = None, **options: Any) -> LatentCodec:
    """The frozen VAE and text encoder of a pipeline; dtype may be a name ("bfloat16"); options: those of `LatentCodec`."""
    folder = find(pipeline, "vae", "text_encoder", "tokenizer")
    with explained(pipeline):
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return LatentCodec(vae, text, tokenizer, dtype=dtype, **options)


def is_consistency_model(pipeline: str) -> bool:
    return scheduler_config(pipeline).get("_class_name") == "LCMScheduler"


def training_facts(pipeline: str) -> dict[str, Any]:
    """What `save_pipeline` noted of the training, e.g. the range of w; empty for a folder of another origin."""
    file = find(pipeline, "scheduler") / "lcm.json"
    return json.loads(file.read_text()) if file.is_file() else {}


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
    """Write a pipeline folder that diffusers opens unmodified; VAE, text encoder and tokenizer are copied from `base`.

    more: further UNets' folders by the name they get in it. Adapters are merged into the UNet of `base`, and also saved by
    themselves, in the file that diffusers' `load_lora_weights` looks for.

    The folder is written beside its place and renamed, so it is whole or absent.
    """
    target, source = Path(folder), find(base, "vae", "text_encoder", "tokenizer")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in ("vae", "text_encoder", "tokenizer", "clip"):
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
        scheduler = LCMScheduler(**schedule.config)
    else:  # steps_offset=1 is what StableDiffusionPipeline asks for; trailing spacing does not use it
        options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1}
        scheduler = DDIMScheduler(**schedule.config, **options)
    scheduler.save_pretrained(partial / "scheduler")
    index = {
        "_class_name": "LatentConsistencyModelPipeline" if consistency and takes_w else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2))
    (partial / "lcm.json").write_text(json.dumps(facts, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
