"""Pipeline folders in Stable Diffusion's format, read: teachers, students and the mini model alike."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lcm.core.errors import UserError
from lcm.core.numbers import Count, Dtype, NonNegative
from lcm.core.process import Process, process_of
from lcm.models.attention import check_compiler
from lcm.models.codec import LatentCodec
from lcm.models.families import Family, families, family_of
from lcm.models.loading import load_part, load_tokenizer, read_json
from lcm.models.text import TextEncoder

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")  # of Stable Diffusion, for messages
ASSETS = Path(__file__).parent.parent / "assets"
# The samplers of pipelines from elsewhere, by their scheduler; all others are sampled by DDIM.
SAMPLERS = {"LCMScheduler": "consistency", "FlowMatchLCMScheduler": "consistency", "TCDScheduler": "tcd"}
CONVERT = (
    "a single-file checkpoint is converted by diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
)

log = logging.getLogger(__name__)


def find(pipeline: str | Path) -> Path:
    """Return the folder of a pipeline: `mini` (shipped), a path, or a hub id `owner/name`.

    Raises UserError for a folder that lacks a part of its family's pipeline.
    """
    path = ASSETS / "mini" if pipeline == "mini" else Path(str(pipeline)).expanduser()
    if path.is_file():
        raise UserError(f"{pipeline} is a file, not a pipeline folder: {CONVERT}")
    if not path.is_dir() or not str(pipeline):
        path = download(str(pipeline))
    if not (path / "model_index.json").is_file():
        raise UserError(f"{pipeline} {explanation(path, [part for part in PARTS if not (path / part).exists()])}")
    family = family_of(path)
    own = [family.network, "vae", "scheduler"]
    own += [folder for tower in family.towers if not tower.optional for folder in (tower.encoder, tower.tokenizer)]
    if missing := [folder for folder in own if not (path / folder).is_dir()]:
        raise UserError(f"{pipeline} is not a whole {family.pipelines[0]}: it lacks {', '.join(missing)}")
    return path


def explanation(path: Path, missing: list[str]) -> str:
    """The end of a sentence: the kind of a folder that is no pipeline's, and the folder or the way to give instead."""
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
        return f"is a {class_name}, not a text-to-image pipeline: it lacks {', '.join(missing)}"
    return f"is not a pipeline folder: it lacks {', '.join(missing)}; {CONVERT}"


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

    wanted = ["*.json", "*.txt", "*/*.safetensors", "*/*.json", "*/*.txt", "*/spiece.model"]
    unused = ["safety_checker/*", "image_encoder/*", "vae_*/*", "*.non_ema.*"]  # gigabytes
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=[*unused, "*.fp16*"]))
        if not any(file for kind in families() for file in folder.glob(f"{kind.network}/*.safetensors")):  # it has no others
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=unused))
        return folder
    except Exception as error:
        raise UserError(f"{hub_id!r} is neither a folder here nor reachable on the hub ({type(error).__name__})") from error


def load_family(pipeline: str | Path) -> Family:
    return family_of(find(pipeline))


def load_network(pipeline: str | Path, dtype: torch.dtype = torch.float32, *, name: str | None = None) -> Any:
    """Load the denoising network of a pipeline. name: its folder, by default the family's."""
    folder = find(pipeline)
    family = family_of(folder)
    network = load_part(family.network_class, folder / (name or family.network), torch_dtype=dtype)
    check_fit(network, folder, family)
    if (adapters := adapters_in(folder)) and "rank" not in training_facts(folder):  # a run's are merged into its network
        log.warning(
            f"{adapters[0]} is not used, the network beside it is as it is: merge adapters into a pipeline by diffusers' "
            "load_lora_weights(...), fuse_lora(), unload_lora_weights() and save_pretrained(folder)"
        )
    return network


def check_fit(network: Any, folder: Path, family: Family) -> None:
    """Raise UserError for a network that is not a text-to-image one, or not one for the VAE and text encoders beside it."""
    config, vae = network.config, read_json(folder / "vae" / "config.json")
    takes = config["in_channels"]
    latents = vae.get("latent_channels", takes)
    if takes != latents or config.get("out_channels", takes) not in (takes, 2 * takes):
        raise UserError(
            f"{folder}: its network takes {takes} channels and gives {config['out_channels']}, its latents have {latents}: "
            "give a text-to-image pipeline, not one for inpainting, depth or upscaling"
        )
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise UserError(f"{folder}: its network takes a class beside the text: give a text-to-image pipeline, which does not")
    written = sum(read_json(folder / tower.encoder / "config.json").get("hidden_size", 0) for tower in family.towers)
    if family.network == "unet" and written not in (0, config[family.width]):
        raise UserError(
            f"{folder}: its UNet reads texts of width {config[family.width]}, its text encoders write {written}: give it the "
            "text encoders that it was trained with"
        )


def load_process(pipeline: str | Path) -> Process:
    """Load the noise process of `scheduler/scheduler_config.json`."""
    facts = training_facts(pipeline)
    return process_of({**scheduler_config(pipeline), **{key: facts[key] for key in ("shift",) if key in facts}})


def load_prediction_type(pipeline: str | Path) -> str:
    """Return the output type of a pipeline's network: its scheduler's, "flow_prediction" for flow matching."""
    config = scheduler_config(pipeline)
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    return "flow_prediction" if flow else config.get("prediction_type", "epsilon")


def scheduler_config(pipeline: str | Path) -> dict[str, Any]:
    file = find(pipeline) / "scheduler" / "scheduler_config.json"
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
    """Load the frozen VAE and text encoders of a pipeline.

    dtype: theirs, or its name ("bfloat16"). text_cache: the `memory` of a `TextEncoder`. chunk, cache, compile: see
    `LatentCodec`.
    """
    if compile:
        check_compiler("data.codec.compile")
    folder = find(pipeline)
    family = family_of(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    vae = load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
    if unsupported := [key for key in ("latents_mean", "latents_std") if vae.config[key] is not None]:
        raise UserError(f"{folder}: its VAE has {', '.join(unsupported)}, which is not supported: give a pipeline without")
    towers = [tower for tower in family.towers if (folder / tower.encoder).is_dir()]
    encoders = [load_part(tower.encoder_class, folder / tower.encoder, dtype=torch.float32) for tower in towers]
    tokenizers = [
        load_tokenizer(tower.tokenizer_class, folder / tower.tokenizer, encoder.config)
        for tower, encoder in zip(towers, encoders, strict=True)
    ]
    text = TextEncoder(family, tokenizers, encoders, dtype=dtype, memory=text_cache)
    codec = LatentCodec(vae, text, dtype=dtype, chunk=chunk, cache=cache, compile=compile)
    side = family.config.get("sample_size")
    codec.resolution = side * codec.factor if isinstance(side, int) else None
    return codec


def training_facts(pipeline: str | Path) -> dict[str, Any]:
    """Return what `save_pipeline` recorded of the training, with the sampler of the pipeline's scheduler if it names none."""
    return facts_in(find(pipeline))


def facts_in(folder: Path) -> dict[str, Any]:
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    return {"sampler": SAMPLERS.get(str(scheduler), "ddim"), **read_json(folder / "lcm.json")}
