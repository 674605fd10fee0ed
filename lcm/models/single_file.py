"""Stable Diffusion's original layout: one .safetensors file that ComfyUI, A1111 and Forge load.

The names are those of CompVis' and Stability's code. diffusers reads them by its own converter, but writes only its folders.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING as LAYOUT
from diffusers.loaders.single_file_utils import LDM_UNET_KEY as UNET
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from torch import Tensor, cat

from lcm.core.errors import UserError
from lcm.models.families import families
from lcm.models.loading import as_user_error, check_header, read_json
from lcm.runtime.atomic_io import digest, whole_folder

VAE = "first_stage_model."
SUFFIX = ".safetensors"
BLOCK = re.compile(r"(down_blocks|mid_block|up_blocks)\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # names in the VAE
CONFIGS = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]  # files of a pipeline, without its weights


def unet_weights(unet: Any) -> dict[str, Tensor]:
    """Return the weights of a UNet of Stable Diffusion 1, 2 or XL by their original names. unet: without an input for w."""
    fixed = LAYOUT["unet"]["layers"] | LAYOUT["unet"]["addition_embed_type"]
    depth = unet.config["layers_per_block"] + 1  # resnets of a block, and its change of resolution
    attended = {i for i, block in enumerate(unet.up_blocks) if getattr(block, "attentions", None)}

    def original(name: str) -> str:
        if name in fixed:
            return fixed[name]
        match = BLOCK.fullmatch(name)
        assert match, name
        part, block, kind, layer, rest = match.groups()
        i, j = int(block or 0), int(layer)
        head, _, tail = rest.partition(".")
        match kind:
            case "resnets":
                position, rest = 0, f"{RESNET[head]}.{tail}"
            case "attentions":
                position = 1
            case "downsamplers":
                j, position, rest = depth - 1, 0, f"op.{tail}"
            case _:
                j, position = depth - 1, 2 if i in attended else 1
        if part == "mid_block":
            return f"middle_block.{2 * j + position}.{rest}"
        if part == "down_blocks":
            return f"input_blocks.{1 + i * depth + j}.{position}.{rest}"
        return f"output_blocks.{i * depth + j}.{position}.{rest}"

    return {UNET + original(name): value for name, value in unet.state_dict().items()}


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """Return the weights of a VAE by their original names. The original layout has 1x1 convolutions in the attention."""
    last = len(vae.config["block_out_channels"]) - 1
    weights = {}
    for name, value in vae.state_dict().items():
        original = LAYOUT["vae"].get(name)
        if original is None:
            network, _, inside = name.partition(".")
            match = BLOCK.fullmatch(inside)
            assert match, name
            part, block, kind, layer, rest = match.groups()
            i = int(block or 0) if part == "down_blocks" else last - int(block or 0)
            side = part.partition("_")[0]
            rest = rest.replace("conv_shortcut", "nin_shortcut")
            if kind == "attentions":
                layer_name, _, tail = rest.rpartition(".")
                original = f"mid.attn_1.{ATTENTION[layer_name]}.{tail}"
                value = value if value.ndim == 1 else value[:, :, None, None]
            elif part == "mid_block":
                original = f"mid.block_{int(layer) + 1}.{rest}"
            elif kind == "resnets":
                original = f"{side}.{i}.block.{layer}.{rest}"
            else:
                original = f"{side}.{i}.{side}sample.{rest}"
            original = f"{network}.{original}"
        weights[VAE + original] = value
    return weights


def clip_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights of a CLIP text encoder by their original names.

    weights: with the names `text_model.*` of transformers. prefix: "<...>.transformer." for OpenAI's CLIP, which keeps these
    names, or "<...>.model." for OpenCLIP, which holds q, k and v as one weight.
    """
    if prefix.endswith(".transformer."):
        return {prefix + name: value for name, value in weights.items()}
    fixed, parts = LAYOUT["openclip"]["layers"], LAYOUT["openclip"]["transformer"]
    renamed = {}
    for name, value in weights.items():
        if name in fixed:
            renamed[prefix + fixed[name]] = value.T.contiguous() if name == "text_projection.weight" else value
            continue
        joined = re.fullmatch(r"(.+\.self_attn)\.(q|k|v)_proj\.(weight|bias)", name)
        if joined and joined[2] != "q":
            continue
        original = f"{joined[1]}.in_proj_{joined[3]}" if joined else name
        for diffusers_part, original_part in list(parts.items())[:6]:  # `fixed` has the rest
            original = original.replace(diffusers_part, original_part)
        qkv = cat([weights[f"{joined[1]}.{part}_proj.{joined[3]}"] for part in "qkv"]) if joined else value
        renamed[f"{prefix}transformer.{original}"] = qkv
    return renamed


def split(pipeline: str) -> tuple[Path, str | None] | None:
    """Return the file and the configuration of `<file>.safetensors` or `<file>.safetensors:<configuration>`, else None."""
    file, colon, config = pipeline.partition(f"{SUFFIX}:")
    if colon:
        return Path(file + SUFFIX).expanduser(), config
    return (Path(pipeline).expanduser(), None) if pipeline.endswith(SUFFIX) else None


def as_folder(file: Path, config: str | None) -> Path:
    """Return the pipeline folder of a single file. diffusers converts it once, into the hub's cache.

    config: a pipeline folder or hub id. Only its configs and tokenizers are read. None: diffusers infers the hub id from the
    file's weights. Raises UserError.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}: give a single-file checkpoint, a pipeline folder or a hub id (owner/name)")
    status = file.stat()
    key = digest([str(file.resolve()), status.st_size, status.st_mtime_ns, config])
    folder = Path(HF_HOME) / "single-files" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    check_header(file)
    with safe_open(file, "pt") as content:
        names = list(content.keys())
        if not any(name.startswith(UNET) for name in names):
            kind = "adapters (LoRA)" if any("lora" in name for name in names) else "other weights"
            raise UserError(
                f"{file} is a file, not a pipeline folder, and holds {kind}: give the pipeline, or a whole checkpoint, with "
                f"names such as {UNET}*"
            )
        shapes = {name: WeightShape(content.get_slice(name)) for name in names}
        dtype = content.get_tensor(next(name for name in names if name.startswith(UNET))).dtype
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several processes may convert the same file
        if not folder.is_dir():
            inferred = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
            configs = find_configs(config or inferred, file, named_by_user=config is not None)
            pipeline = getattr(diffusers, class_of(configs))
            with whole_folder(folder) as partial, as_user_error(file):
                loaded = pipeline.from_single_file(str(file), config=str(configs), local_files_only=True, torch_dtype=dtype)
                loaded.save_pretrained(partial)
    return folder


class WeightShape:
    """The shape of a weight that is not loaded, for diffusers' guess at the model."""

    def __init__(self, weight: Any) -> None:
        self.shape = tuple(weight.get_shape())


def find_configs(config: str, file: Path, *, named_by_user: bool) -> Path:
    """Return a folder with the configs of a pipeline: `config` itself, or a download without weights. Raises UserError.

    named_by_user: the user gave `config`, and it was not inferred from the file.
    """
    if (folder := Path(config).expanduser()).is_dir():
        return folder
    try:
        return Path(snapshot_download(config, allow_patterns=CONFIGS))
    except Exception as error:
        name = f"the configuration {config!r}" if named_by_user else f"{file} looks like {config}, whose configuration"
        raise UserError(
            f"{name} is neither a folder here nor reachable on the hub ({type(error).__name__}): name a pipeline folder of "
            f"this kind behind the file, as {file}:<folder>; only its configs and tokenizers are read"
        ) from error


def class_of(configs: Path) -> str:
    """Return the class of a pipeline folder. Raises UserError unless a family here has it."""
    name = read_json(configs / "model_index.json").get("_class_name")
    known = [name for family in families() for name in family.pipelines]
    if name not in known:
        raise UserError(f"{configs} is the configuration of a {name}, which is not supported: use one of {', '.join(known)}")
    return str(name)
