"""Pipeline folders in Stable Diffusion's format, read: teachers, students and the mini model alike."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm.core.numbers import Count, Dtype, NonNegative
from lcm.core.schedule import NoiseSchedule
from lcm.data.codec import LatentCodec
from lcm.data.text import TextEncoder, XLTextEncoder
from lcm.errors import UserError
from lcm.models.parts import explained, load_network, read_json

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
OF_XL = ("text_encoder_2", "tokenizer_2")  # of a Stable Diffusion XL pipeline, too
ASSETS = Path(__file__).parent.parent / "assets"


def find(pipeline: str, *parts: str) -> Path:
    """The folder of a pipeline: `mini` (shipped), a path, or a hub id `owner/name`, with the given parts in it."""
    path = ASSETS / "mini" if pipeline == "mini" else Path(pipeline)
    if not path.is_dir():
        path = download(pipeline)
    if (path / "model" / "model_index.json").is_file():
        raise UserError(f"{pipeline} is a run's folder: give {path / 'model'}")
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

    wanted = ["*.json", "*.txt", "*/*.safetensors", "*/*.json", "*/*.txt"]
    unused = ["safety_checker/*", "image_encoder/*", "vae_*/*", "*.non_ema.*"]  # gigabytes
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=[*unused, "*.fp16*"]))
        if not any(folder.glob("unet/*.safetensors")):  # it has no others
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=unused))
        return folder
    except Exception as error:
        raise UserError(f"{hub_id!r} is neither a folder here nor reachable on the hub ({type(error).__name__})") from error


def load_unet(pipeline: str, dtype: torch.dtype = torch.float32, *, name: str = "unet") -> UNet2DConditionModel:
    folder = find(pipeline, name, "scheduler")
    unet = load_network(UNet2DConditionModel, folder / name, torch_dtype=dtype)
    check_fit(unet, folder)
    return unet


def check_fit(unet: UNet2DConditionModel, folder: Path) -> None:
    """Raise UserError for a UNet that is not a text-to-image one, or not one for the VAE and text encoders beside it."""
    config, vae = unet.config, read_json(folder / "vae" / "config.json")
    takes, gives, reads = config["in_channels"], config["out_channels"], config["cross_attention_dim"]
    latents = vae.get("latent_channels", takes)
    written = sum(read_json(folder / part / "config.json").get("hidden_size", 0) for part in ("text_encoder", OF_XL[0]))
    if not takes == gives == latents:
        raise UserError(
            f"{folder}: its UNet takes {takes} channels and gives {gives}, its latents have {latents}: give a text-to-image "
            "pipeline, not one for inpainting, depth or upscaling"
        )
    if config["num_class_embeds"] is not None or config["class_embed_type"] is not None:
        raise UserError(f"{folder}: its UNet is told a class beside the text: give a text-to-image pipeline, which is not")
    if written and written != reads:
        raise UserError(
            f"{folder}: its UNet reads texts of width {reads}, its text encoders write {written}: give it the text encoders "
            "that it was trained with"
        )


def load_schedule(pipeline: str) -> NoiseSchedule:
    """The noise schedule and prediction type of `scheduler/scheduler_config.json`."""
    return NoiseSchedule.from_config(scheduler_config(pipeline))


def scheduler_config(pipeline: str) -> dict[str, Any]:
    file = find(pipeline, "scheduler") / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{pipeline} has no scheduler/scheduler_config.json")
    return read_json(file)


def load_codec(
    pipeline: str,
    *,
    dtype: torch.dtype | Dtype | None = None,
    text_cache: NonNegative = 256,
    chunk: Count = 64,
    cache: bool = False,
    compile: bool = False,
) -> LatentCodec:
    """The frozen VAE and text encoders of a pipeline; dtype: theirs, or its name ("bfloat16"); text_cache: the `memory` of a
    `TextEncoder`; chunk, cache, compile: as of `LatentCodec`."""
    folder = find(pipeline, "vae", "text_encoder", "tokenizer")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def tower(kind: type, ending: str = "") -> tuple[CLIPTokenizer, torch.nn.Module]:
        network = load_network(kind, folder / f"text_encoder{ending}", dtype=torch.float32)
        with explained(folder):
            return CLIPTokenizer.from_pretrained(folder / f"tokenizer{ending}"), network

    vae, first = load_network(AutoencoderKL, folder / "vae", torch_dtype=torch.float32), tower(CLIPTextModel)
    if odd := [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.config[key] is not None]:
        raise UserError(f"{folder}: its VAE has {', '.join(odd)}, but latents are only scaled here: give a pipeline without")
    text: TextEncoder
    if is_xl(folder):
        second = tower(CLIPTextModelWithProjection, "_2")
        text = XLTextEncoder(first, second, zero_null=zero_null(folder), dtype=dtype, memory=text_cache)
    else:
        text = TextEncoder(first, dtype=dtype, memory=text_cache)
    return LatentCodec(vae, text, dtype=dtype, chunk=chunk, cache=cache, compile=compile)


def is_xl(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in OF_XL)


def zero_null(folder: Path) -> bool:
    """Whether the null prompt of a Stable Diffusion XL pipeline is zeros, as it is unless the folder says otherwise."""
    return read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)


def is_consistency_model(pipeline: str) -> bool:
    return scheduler_config(pipeline).get("_class_name") == "LCMScheduler"


def training_facts(pipeline: str) -> dict[str, Any]:
    """What `save_pipeline` noted of the training, e.g. the range of w; empty for a folder of another origin."""
    return read_json(find(pipeline, "scheduler") / "lcm.json")
