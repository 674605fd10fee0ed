"""Pipeline folders in Stable Diffusion's format, read: teachers, students and the mini model alike."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from lcm.core.process import Process, process_of
from lcm.errors import UserError
from lcm.models.codec import LatentCodec
from lcm.models.families import Family, families, family_of
from lcm.models.parts import explained, load_part, read_json
from lcm.models.text import TextEncoder

ASSETS = Path(__file__).parent.parent / "assets"
# The samplers of pipelines from elsewhere, by their scheduler; all others are sampled by DDIM.
SAMPLERS = {"LCMScheduler": "consistency", "FlowMatchLCMScheduler": "consistency", "TCDScheduler": "tcd"}


def find(pipeline: str) -> Path:
    """Return the folder of a pipeline: `mini` (shipped), a path, or a hub id `owner/name`."""
    path = ASSETS / "mini" if pipeline == "mini" else Path(pipeline)
    if not path.is_dir():
        path = download(pipeline)
    if (path / "model" / "model_index.json").is_file():
        raise UserError(f"{pipeline} is a run's folder: give {path / 'model'}")
    family = family_of(path)
    folders = [family.network, "vae", "scheduler"]
    folders += [folder for tower in family.towers if not tower.optional for folder in (tower.encoder, tower.tokenizer)]
    if missing := [folder for folder in folders if not (path / folder).is_dir()]:
        raise UserError(f"{pipeline} is not a whole {family.pipelines[0]}: it lacks {', '.join(missing)}")
    return path


def download(hub_id: str) -> Path:
    """A snapshot of a hub repository's safetensors and configs."""
    if len(hub_id.split("/")) != 2 or hub_id.startswith((".", "/")):
        raise UserError(f"there is no pipeline folder {hub_id!r}: give a folder, a hub id (owner/name), or 'mini'")
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


def load_family(pipeline: str) -> Family:
    return family_of(find(pipeline))


def load_network(pipeline: str, dtype: torch.dtype = torch.float32, *, name: str | None = None) -> Any:
    """Load the denoising network of a pipeline. name: its folder, by default the family's."""
    folder = find(pipeline)
    family = family_of(folder)
    network = load_part(family.network_class, folder / (name or family.network), torch_dtype=dtype)
    check_fit(network, folder)
    return network


def check_fit(network: Any, folder: Path) -> None:
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


def load_process(pipeline: str) -> Process:
    """Load the noise process of `scheduler/scheduler_config.json`."""
    facts = training_facts(pipeline)
    return process_of({**scheduler_config(pipeline), **{key: facts[key] for key in ("shift",) if key in facts}})


def load_prediction_type(pipeline: str) -> str:
    """Return the output type of a pipeline's network: its scheduler's, "flow_prediction" for flow matching."""
    config = scheduler_config(pipeline)
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    return "flow_prediction" if flow else config.get("prediction_type", "epsilon")


def scheduler_config(pipeline: str) -> dict[str, Any]:
    file = find(pipeline) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{pipeline} has no scheduler/scheduler_config.json")
    return read_json(file)


def load_codec(
    pipeline: str, *, dtype: torch.dtype | str | None = None, text_cache: float = 256, **options: Any
) -> LatentCodec:
    """Load the frozen VAE and text encoders of a pipeline.

    dtype: theirs, or its name ("bfloat16"). text_cache: the `memory` of a `TextEncoder`. options: those of `LatentCodec`.
    """
    folder = find(pipeline)
    family = family_of(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    vae = load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
    if unsupported := [key for key in ("latents_mean", "latents_std") if vae.config[key] is not None]:
        raise UserError(f"{folder}: its VAE has {', '.join(unsupported)}, which is not supported: give a pipeline without")
    towers = [tower for tower in family.towers if (folder / tower.encoder).is_dir()]
    encoders = [load_part(tower.encoder_class, folder / tower.encoder, dtype=torch.float32) for tower in towers]
    tokenizers = []
    for tower in towers:
        with explained(folder):
            tokenizers.append(tower.tokenizer_class.from_pretrained(folder / tower.tokenizer))
    return LatentCodec(vae, TextEncoder(family, tokenizers, encoders, dtype=dtype, memory=text_cache), dtype=dtype, **options)


def training_facts(pipeline: str) -> dict[str, Any]:
    """Return what `save_pipeline` recorded of the training, with the sampler of the pipeline's scheduler if it names none."""
    facts = read_json(find(pipeline) / "lcm.json")
    return {"sampler": SAMPLERS.get(str(scheduler_config(pipeline).get("_class_name")), "ddim"), **facts}
