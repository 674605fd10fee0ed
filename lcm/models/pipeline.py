"""Pipeline folders in Stable Diffusion's format, read: teachers, students and the mini model alike."""

import logging
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
from lcm.models.kernels import check_compiler
from lcm.models.parts import load_network, load_tokenizer, read_json

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
OF_XL = ("text_encoder_2", "tokenizer_2")  # of a Stable Diffusion XL pipeline, too
ASSETS = Path(__file__).parent.parent / "assets"
CONVERT = (
    "a single-file checkpoint is converted by diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
)

log = logging.getLogger(__name__)


def find(pipeline: str | Path, *parts: str) -> Path:
    """The folder of a pipeline: `mini` (shipped), a path, or a hub id `owner/name`, with the given parts in it."""
    path = ASSETS / "mini" if pipeline == "mini" else Path(str(pipeline)).expanduser()
    if path.is_file():
        raise UserError(f"{pipeline} is a file, not a pipeline folder: {CONVERT}")
    if not path.is_dir() or not str(pipeline):
        path = download(str(pipeline))
    missing = [part for part in dict.fromkeys(PARTS + parts) if not (path / part).is_dir()]
    if set(missing) & set(parts or PARTS):
        raise UserError(f"{pipeline} {explanation(path, missing)}")
    return path


def explanation(path: Path, missing: list[str]) -> str:
    """The end of a sentence: the kind of a folder that is no pipeline's, and the folder or the way to give instead."""
    if not set(missing) & set(PARTS):
        return f"has no {', '.join(missing)} beside its other parts: give a pipeline that has"
    places = ("model", "*", "*/model", "*/*/model", "snapshots/*", "models--*/snapshots/*")
    inside = [file.parent for place in places for file in path.glob(f"{place}/model_index.json")]
    above = [folder for folder in path.absolute().parents if (folder / "model_index.json").is_file()]
    if near := [*sorted(inside, key=lambda folder: folder.stat().st_mtime)[-1:], *above][:1]:
        cached = [part.split("--", 1)[1].replace("--", "/") for part in near[0].absolute().parts if part.startswith("models--")]
        if cached and inside:
            return f"is a folder of the hub's cache: give {near[0]}, or the hub id {cached[-1]}"
        kind = "a run's folder" if inside and (near[0] / "lcm.json").is_file() else "not a pipeline's folder"
        return f"is {kind}: give {near[0]}"
    if adapters_in(path):
        return (
            "holds adapters (LoRA) only: give the pipeline they were trained for, or merge them into it by diffusers' "
            "load_lora_weights(...), fuse_lora(), unload_lora_weights() and save_pretrained(folder)"
        )
    config = {**read_json(path / "config.json"), **read_json(path / "model_index.json")}
    class_name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if class_name and not str(class_name).startswith("StableDiffusion"):
        return f"is a {class_name}, not a Stable Diffusion pipeline: it lacks {', '.join(missing)}"
    return f"is not a Stable Diffusion pipeline folder: it lacks {', '.join(missing)}; {CONVERT}"


def adapters_in(folder: Path) -> list[Path]:
    """Files of adapters (LoRA), as diffusers and peft name them."""
    return [*folder.glob("*lora*.safetensors"), *folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")]


def download(hub_id: str) -> Path:
    """A snapshot of a hub repository's safetensors and configs."""
    if len(hub_id.split("/")) != 2 or hub_id.startswith((".", "/", "~")):
        raise UserError(
            f"there is no pipeline folder {hub_id!r}: give a folder, a hub id (owner/name), mini, last (the newest model of a "
            "run) or last:<name of a run>"
        )
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


def load_unet(pipeline: str | Path, dtype: torch.dtype = torch.float32, *, name: str = "unet") -> UNet2DConditionModel:
    folder = find(pipeline, name, "scheduler")
    unet = load_network(UNet2DConditionModel, folder / name, torch_dtype=dtype)
    check_fit(unet, folder)
    if (adapters := adapters_in(folder)) and "rank" not in training_facts(folder):  # a run's are merged into its UNet
        log.warning(
            f"{adapters[0]} is not used, the UNet beside it is as it is: merge adapters into a pipeline by diffusers' "
            "load_lora_weights(...), fuse_lora(), unload_lora_weights() and save_pretrained(folder)"
        )
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


def load_schedule(pipeline: str | Path) -> NoiseSchedule:
    """The noise schedule and prediction type of `scheduler/scheduler_config.json`."""
    return NoiseSchedule.from_config(scheduler_config(pipeline))


def scheduler_config(pipeline: str | Path) -> dict[str, Any]:
    file = find(pipeline, "scheduler") / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{pipeline} has no scheduler/scheduler_config.json")
    return read_json(file)


def load_codec(
    pipeline: str | Path,
    *,
    dtype: torch.dtype | Dtype | None = None,
    text_cache: NonNegative = 256,
    chunk: Count = 64,
    cache: bool = False,
    compile: bool = False,
) -> LatentCodec:
    """The frozen VAE and text encoders of a pipeline; dtype: theirs, or its name ("bfloat16"); text_cache: the `memory` of a
    `TextEncoder`; chunk, cache, compile: as of `LatentCodec`."""
    if compile:
        check_compiler("data.codec.compile")
    folder = find(pipeline, "vae", "text_encoder", "tokenizer")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def tower(kind: type, ending: str = "") -> tuple[CLIPTokenizer, torch.nn.Module]:
        network = load_network(kind, folder / f"text_encoder{ending}", dtype=torch.float32)
        return load_tokenizer(folder / f"tokenizer{ending}", network.config), network

    vae, first = load_network(AutoencoderKL, folder / "vae", torch_dtype=torch.float32), tower(CLIPTextModel)
    if odd := [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.config[key] is not None]:
        raise UserError(f"{folder}: its VAE has {', '.join(odd)}, but latents are only scaled here: give a pipeline without")
    text: TextEncoder
    if is_xl(folder):
        second = tower(CLIPTextModelWithProjection, "_2")
        text = XLTextEncoder(first, second, zero_null=zero_null(folder), dtype=dtype, memory=text_cache)
    else:
        text = TextEncoder(first, dtype=dtype, memory=text_cache)
    codec = LatentCodec(vae, text, dtype=dtype, chunk=chunk, cache=cache, compile=compile)
    side = read_json(folder / "unet" / "config.json").get("sample_size")
    codec.resolution = side * codec.factor if isinstance(side, int) else None
    return codec


def is_xl(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in OF_XL)


def zero_null(folder: Path) -> bool:
    """Whether the null prompt of a Stable Diffusion XL pipeline is zeros, as it is unless the folder says otherwise."""
    return read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)


def is_consistency_model(pipeline: str | Path) -> bool:
    return scheduler_config(pipeline).get("_class_name") == "LCMScheduler"


def training_facts(pipeline: str | Path) -> dict[str, Any]:
    """What `save_pipeline` noted of the training, e.g. the range of w; empty for a folder of another origin."""
    return read_json(find(pipeline, "scheduler") / "lcm.json")
