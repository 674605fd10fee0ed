"""Loading of pipeline folders: teachers, students and the mini model."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lcm.core.denoiser import PREDICTION_TYPES
from lcm.core.errors import UserError
from lcm.core.numbers import Count, Dtype, NonNegative
from lcm.core.process import Process, process_of
from lcm.models import single_file
from lcm.models.attention import check_compiler
from lcm.models.codec import LatentCodec
from lcm.models.families import Family, families, family_of
from lcm.models.loading import load_part, load_tokenizer, read_json
from lcm.models.text import TextEncoder

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")  # Stable Diffusion's, for messages
ASSETS = Path(__file__).parent.parent / "assets"
# Samplers by scheduler, for folders without lcm.json. The default is DDIM.
SAMPLERS = {"LCMScheduler": "consistency", "FlowMatchLCMScheduler": "consistency", "TCDScheduler": "tcd"}
CONVERT = "give a pipeline folder, or a single-file checkpoint as <file>.safetensors"
MERGE = "diffusers' load_lora_weights(...), fuse_lora(), unload_lora_weights() and save_pretrained(folder)"

log = logging.getLogger(__name__)


def find(pipeline: str | Path) -> Path:
    """Return the folder of a pipeline: `mini` (shipped), a path, a hub id `owner/name`, or a single file, converted once.

    Raises UserError if the folder lacks a part of its family's pipeline.
    """
    path = ASSETS / "mini" if pipeline == "mini" else Path(str(pipeline)).expanduser()
    if not path.is_dir() and (single := single_file.split(str(pipeline))):
        path = single_file.as_folder(*single)
    if path.is_file():
        raise UserError(f"{pipeline} is a file, not a pipeline folder or a .safetensors file: {CONVERT}")
    if not path.is_dir() or not str(pipeline):
        path = download(str(pipeline))
    if not (path / "model_index.json").is_file():
        raise UserError(f"{pipeline} {why_no_pipeline(path)}")
    family = family_of(path)
    required = [family.network, "vae", "scheduler"]
    required += [folder for tower in family.towers if not tower.optional for folder in (tower.encoder, tower.tokenizer)]
    if (path / "vae_decoder").is_dir():
        raise UserError(f"{pipeline} holds graphs for optimum: give the pipeline that they were made from, and engine=openvino")
    if missing := [folder for folder in required if not (path / folder).is_dir()]:
        raise UserError(f"{pipeline} is not a whole {family.pipelines[0]}: it lacks {', '.join(missing)}")
    return path


def why_no_pipeline(path: Path) -> str:
    """Return the end of an error message: the kind of the folder, and the folder or id to give instead."""
    missing = [part for part in PARTS if not (path / part).exists()]
    patterns = ("model", "*", "*/model", "*/*/model", "snapshots/*", "models--*/snapshots/*")
    inside = [file.parent for pattern in patterns for file in path.glob(f"{pattern}/model_index.json")]
    above = [folder for folder in path.absolute().parents if (folder / "model_index.json").is_file()]
    inside.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    if nearest := next(iter([*inside, *above]), None):
        hub_ids = [
            part.split("--", 1)[1].replace("--", "/") for part in nearest.absolute().parts if part.startswith("models--")
        ]
        if hub_ids and inside:
            return f"is a folder of the hub's cache: give {nearest}, or the hub id {hub_ids[-1]}"
        kind = "a run's folder" if inside and (nearest / "lcm.json").is_file() else "not a pipeline's folder"
        return f"is {kind}: give {nearest}"
    if adapters_in(path):
        return f"holds adapters (LoRA) only: give the pipeline they were trained for, or merge them into it by {MERGE}"
    config = {**read_json(path / "config.json"), **read_json(path / "model_index.json")}
    class_name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if class_name and not str(class_name).startswith("StableDiffusion"):
        return f"is a {class_name}, not a text-to-image pipeline: it lacks {', '.join(missing)}"
    return f"is not a pipeline folder: it lacks {', '.join(missing)}; {CONVERT}"


def adapters_in(folder: Path) -> list[Path]:
    """Return the files named like adapters (LoRA) of diffusers and peft."""
    return [*folder.glob("*lora*.safetensors"), *folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")]


def download(hub_id: str) -> Path:
    """Download a hub repository's safetensors and configs into the hub's cache, and return the folder."""
    if len(hub_id.split("/")) != 2 or hub_id.startswith((".", "/", "~")):
        raise UserError(
            f"there is no pipeline folder {hub_id!r}: give a folder, a hub id (owner/name), mini, last (the newest model of a "
            "run) or last:<name of a run>"
        )
    from huggingface_hub import snapshot_download

    needed = ["*.json", "*.txt", "*/*.safetensors", "*/*.json", "*/*.txt", "*/spiece.model"]
    unused = ["safety_checker/*", "image_encoder/*", "vae_*/*", "*.non_ema.*"]  # gigabytes
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=needed, ignore_patterns=[*unused, "*.fp16*"]))
        if not any(file for family in families() for file in folder.glob(f"{family.network}/*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=needed, ignore_patterns=unused))  # fp16 files only
        return folder
    except Exception as error:
        raise UserError(
            f"{hub_id!r} is neither a folder here nor reachable on the hub ({type(error).__name__}): check the name and the "
            "connection"
        ) from error


def load_family(pipeline: str | Path) -> Family:
    """Return the family of a pipeline."""
    return family_of(find(pipeline))


def load_network(pipeline: str | Path, dtype: torch.dtype = torch.float32, *, name: str | None = None) -> Any:
    """Load the denoising network of a pipeline. name: its folder, by default the family's."""
    folder = find(pipeline)
    family = family_of(folder)
    check_prediction_type(folder)
    network = load_part(family.network_class, folder / (name or family.network), torch_dtype=dtype)
    check_fit(network, folder, family)
    if (adapters := adapters_in(folder)) and "rank" not in read_lcm_json(folder):  # our own adapters are merged already
        log.warning(f"{adapters[0]} is not used, only the network in this folder: merge adapters into a pipeline by {MERGE}")
    return network


def load_vae(pipeline: str | Path) -> Any:
    """Load the VAE of a pipeline, or of the folder that an autoencoder's training has saved, in training mode."""
    folder = Path(pipeline).expanduser()
    folder = folder if (folder / "vae" / "config.json").is_file() else find(pipeline)
    return load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32).train()


def check_fit(network: Any, folder: Path, family: Family) -> None:
    """Raise UserError if the network is not a text-to-image network, or does not fit the folder's VAE or text encoders."""
    config, vae = network.config, read_json(folder / "vae" / "config.json")
    channels = config["in_channels"]
    latent_channels = vae.get("latent_channels", channels)
    if channels != latent_channels or config.get("out_channels", channels) not in (channels, 2 * channels):
        raise UserError(
            f"{folder}: its network takes {channels} channels and gives {config['out_channels']}, its latents have "
            f"{latent_channels}: give a text-to-image pipeline, not one for inpainting, depth or upscaling"
        )
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise UserError(
            f"{folder}: its network takes a class label besides the text: give a text-to-image pipeline without classes"
        )
    width = family.embedding_width([read_json(folder / tower.encoder / "config.json") for tower in family.towers])
    if width not in (None, config[family.width]):
        raise UserError(
            f"{folder}: its network expects text embeddings of width {config[family.width]}, but its text encoders give "
            f"{width}: use the text encoders that the network was trained with"
        )


def load_process(pipeline: str | Path) -> Process:
    """Load the noise process of `scheduler/scheduler_config.json`."""
    folder = find(pipeline)
    config, metadata = scheduler_config(folder), read_lcm_json(folder)
    return process_of({**config, "shift": metadata["shift"]} if "shift" in metadata else config)


def load_prediction_type(pipeline: str | Path) -> str:
    """Return the output type of a pipeline's network by its scheduler; "flow_prediction" for flow matching."""
    config = scheduler_config(find(pipeline))
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    return "flow_prediction" if flow else config.get("prediction_type", "epsilon")


def check_prediction_type(folder: Path) -> None:
    """Raise UserError for an unknown output type, before weights are read."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if (prediction_type := config.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise UserError(
            f"{folder}/scheduler/scheduler_config.json has an unknown prediction_type {prediction_type!r}: use one of "
            f"{', '.join(PREDICTION_TYPES)}"
        )


def scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the content of `scheduler/scheduler_config.json`. Raises UserError if it is missing."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{folder} has no scheduler/scheduler_config.json: copy it from the pipeline's source")
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

    dtype: the dtype of all these networks, or its name ("bfloat16"). text_cache: the `memory` of `TextEncoder`. chunk, cache,
    compile: see `LatentCodec`.
    """
    if compile:
        check_compiler("data.codec.compile")
    folder = find(pipeline)
    family = family_of(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    vae = load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
    if unsupported := [key for key in ("latents_mean", "latents_std") if vae.config[key] is not None]:
        raise UserError(f"{folder}: its VAE has {', '.join(unsupported)}, which is not supported: give a pipeline without them")
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


def read_lcm_json(folder: str | Path) -> dict[str, Any]:
    """Return the content of a pipeline folder's `lcm.json`. Without the file it holds the sampler of the scheduler only."""
    folder = Path(folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    return {"sampler": SAMPLERS.get(str(scheduler), "ddim"), **read_json(folder / "lcm.json")}
