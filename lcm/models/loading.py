"""Loading of a part of a pipeline folder: a config, a tokenizer, or a network from complete, finite safetensors."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, PretrainedConfig

from lcm.core.errors import UserError

N = TypeVar("N", bound=nn.Module)
COMPLETE = ("model", "diffusion_pytorch_model")  # names of unsharded files in transformers and diffusers
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
CLIP_TYPES = ("clip", "clip_text_model")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@contextmanager
def as_user_error(name: object) -> Iterator[None]:
    """Turn a library's error about the files of a part into a UserError. The tokenizers library raises plain Exceptions."""
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot load {name}: {' '.join(str(error).split())}: copy it anew from the model's source") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in the file, or an empty one if there is no file. Raises UserError."""
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        reason = damage(file) or error
        raise UserError(f"{file} is not JSON ({reason}): copy it anew from the pipeline's source") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: copy it anew from the pipeline's source")
    return content


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """Load a network with all of its weights. kind: a class of diffusers or transformers. Raises UserError.

    Both libraries only warn of missing weights: one leaves the tensors empty, the other draws random numbers.
    """
    variant, files = weight_files(folder)
    if kind.__name__.startswith("CLIP"):
        check_is_clip(folder)
    for file in files:
        check_header(file)
    for file in folder.glob("*.index*.json"):
        read_json(file)
    with as_user_error(folder):
        network, info = kind.from_pretrained(folder, use_safetensors=True, variant=variant, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"cannot load {folder}: {len(missing)} of its weights are missing, such as {missing[0]}: copy weights and "
            "config.json anew from the pipeline's source"
        )
    check_finite(folder, network.state_dict())
    return network


def weight_files(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the variant of a network's folder and its safetensors files.

    The variant is "fp16" if there is `model.fp16.safetensors` but no `model.safetensors`. Raises UserError without files.
    """
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        variants.setdefault(".".join(file.name.split(".")[1:-1]).partition("-")[0], []).append(file)
    if not variants:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        advice = "copy the whole pipeline, or save_pretrained() it as safetensors if it has .bin files only"
        if pickled:
            advice = (
                f"{pickled[0]} may hold code; if you trust it, load it with its library and save_pretrained() it as safetensors"
            )
        raise UserError(f"cannot load {folder}: it has no .safetensors file: {advice}")
    variant = min(variants)
    files = variants[variant]
    return variant or None, [file for file in files if file.name.split(".")[0] in COMPLETE] or files


def check_header(file: Path) -> None:
    """Raise UserError if a file is not complete safetensors. Reads no weights."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = damage(file) or f"is cut or damaged ({error})"
        raise UserError(f"cannot load {file}: it {reason}: copy it anew from the model's source") from error


def damage(file: Path) -> str | None:
    """Return "is ..." if a file is empty, a git-lfs pointer or a web page, else None."""
    with file.open("rb") as content:
        start = content.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself (`git lfs pull` fetches it)"
    return "is a web page, not the file itself" if start.lstrip().startswith(b"<") else None


def load_weights(file: str, network: str, advice: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a torch file that holds tensors only. Raises UserError.

    network: the name of the weights' network. advice: where to get the file, as the end of a message.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"there are no {network} weights at {file}: {advice}")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{file} is not a file of weights only: {advice}") from error
    check_finite(file, weights)
    return weights


def non_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights that contain NaN or infinity."""

    def is_finite(value: Tensor) -> bool:
        value = value.float() if value.element_size() == 1 else value  # aminmax does not support float8
        return all(bool(extreme.isfinite()) for extreme in value.detach().aminmax())

    return [name for name, value in weights.items() if value.is_floating_point() and value.numel() and not is_finite(value)]


def check_finite(name: object, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError if loaded weights contain NaN or infinity."""
    if bad := non_finite(weights):
        half = "" if weights[bad[0]].dtype != torch.float16 else " in float16, whose largest number is 65504"
        raise UserError(
            f"cannot load {name}: {len(bad)} of its weights are not finite{half}, such as {bad[0]}: use bfloat16 or float32, "
            "or a model whose training did not diverge"
        )


def cast_copy(network: N, dtype: torch.dtype) -> N:
    """Return a copy of the network in this dtype, to be saved. Raises UserError if a weight is not finite in this dtype."""
    copied = nn.Module.to(copy.deepcopy(network), dtype)
    check_saved(copied.state_dict(), network.state_dict())
    return copied


def check_saved(weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Raise UserError if weights to save contain NaN or infinity. trained: the same weights in the training's dtype."""
    bad = non_finite(weights)
    if diverged := non_finite({name: trained[name] for name in bad}):
        raise UserError(
            f"{len(diverged)} of the weights to save are not finite, such as {diverged[0]}, and nothing is saved: resume from "
            "a checkpoint before the loss grew, with a lower model.optimizer.lr"
        )
    if bad:
        dtype, extreme = str(weights[bad[0]].dtype).removeprefix("torch."), trained[bad[0]].abs().max()
        raise UserError(
            f"{len(bad)} of the weights to save are too large for {dtype}, such as {bad[0]} ({extreme:.3g}), and nothing is "
            "saved: save them by `python -m lcm.export run=<folder> dtype=bfloat16`"
        )


def check_is_clip(folder: Path) -> None:
    """Raise UserError if a text encoder's folder does not hold CLIP."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    name = next(iter(config.get("architectures") or ()), kind or "CLIPTextModel")
    if kind not in CLIP_TYPES and (kind or not name.startswith("CLIP")):
        raise UserError(f"{folder} holds a {name}: only CLIP's text encoders are supported: give a pipeline that has one")


def load_tokenizer(tokenizer_class: Any, folder: Path, text_config: PretrainedConfig) -> Any:
    """Load the tokenizer of a text encoder. tokenizer_class: a class of transformers. text_config: the encoder's config.

    CLIP's tokenizer truncates captions to the encoder's length. Raises UserError for a tokenizer of another class, and for a
    vocabulary of another size. For a folder without files, transformers would return an empty tokenizer. Without merges, its
    tokenizer would split words into letters.
    """
    if tokenizer_class is CLIPTokenizer:
        check_clip_tokenizer(folder)
    with as_user_error(folder):
        tokenizer = tokenizer_class.from_pretrained(folder)
    if not 0.9 * text_config.vocab_size <= len(tokenizer) <= text_config.vocab_size:  # encoders may pad their vocabulary
        raise UserError(
            f"{folder} has {len(tokenizer)} tokens, but its text encoder has {text_config.vocab_size}: use the tokenizer that "
            "the text encoder was trained with"
        )
    if tokenizer_class is CLIPTokenizer:
        check_merges(folder, tokenizer)
        tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


def check_clip_tokenizer(folder: Path) -> None:
    """Raise UserError if a folder holds a tokenizer of another class, or if files of its vocabulary are missing or damaged."""
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class") or "CLIPTokenizer"
    if name not in CLIP_TOKENIZERS:
        raise UserError(f"{folder} holds a {name}: only CLIP's tokenizers are supported: give a pipeline that has one")
    files = [folder / "tokenizer.json"]
    if not files[0].is_file():
        files = [folder / "vocab.json", folder / "merges.txt"]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{folder} lacks its vocabulary (missing: {', '.join(missing)}): copy tokenizer.json, or vocab.json and "
            "merges.txt, from the pipeline's source"
        )
    for file in files:
        if reason := damage(file):
            raise UserError(f"cannot load {file}: it {reason}: copy it anew from the pipeline's source")
    read_json(files[0])


def check_merges(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Raise UserError if over 10 % of the tokens of several letters have no merge."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    longer = {token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1} - set(tokenizer.all_special_tokens)
    unmerged = longer - {"".join(merge) for merge in model["merges"]}
    if len(unmerged) > 0.1 * len(longer):
        raise UserError(
            f"{folder} has no merges for {len(unmerged)} of its {len(longer)} longer tokens: its merges are cut, copy them "
            "anew from the pipeline's source"
        )
