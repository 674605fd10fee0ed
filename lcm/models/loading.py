"""One part of a pipeline folder: its configuration, its tokenizer, its network with all weights, finite and without code."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer, PretrainedConfig

from lcm.core.errors import UserError

N = TypeVar("N", bound=nn.Module)
WHOLE = ("model", "diffusion_pytorch_model")  # names of files, of transformers and diffusers
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
CLIP_TYPES = ("clip", "clip_text_model")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@contextmanager
def explained(name: object) -> Iterator[None]:
    """A library's complaint about a part's files as one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise UserError(f"cannot load {name}: {' '.join(str(error).split())}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({damage(file) or error}): copy it anew from where the pipeline came") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: copy it anew from where the pipeline came")
    return content


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """kind: a class of diffusers or transformers, which of missing weights only warn: one leaves them empty, one draws them."""
    variant, files = weight_files(folder)
    if kind.__name__.startswith("CLIP"):
        check_is_clip(folder)
    for file in files:
        check_header(file)
    for file in folder.glob("*.index*.json"):
        read_json(file)
    with explained(folder):
        network, info = kind.from_pretrained(folder, use_safetensors=True, variant=variant, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"cannot load {folder}: {len(missing)} of its weights are missing, such as {missing[0]}: copy weights and "
            "config.json anew from where the pipeline came"
        )
    check_finite(folder, network.state_dict())
    return network


def weight_files(folder: Path) -> tuple[str | None, list[Path]]:
    """The safetensors files that hold a network, and their variant.

    The variant is "fp16" for a folder that has `model.fp16.safetensors` and no `model.safetensors`.
    """
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        variants.setdefault(".".join(file.name.split(".")[1:-1]).partition("-")[0], []).append(file)
    if not variants:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        cure = "copy the whole pipeline, or save_pretrained() it as safetensors if it has .bin files only"
        if pickled:
            cure = (
                f"{pickled[0]} may hold code; if you trust it, load it with its library and save_pretrained() it as safetensors"
            )
        raise UserError(f"cannot load {folder}: it has no .safetensors file: {cure}")
    variant = min(variants)
    files = variants[variant]
    return variant or None, [file for file in files if file.name.split(".")[0] in WHOLE] or files


def check_header(file: Path) -> None:
    """Raise UserError for a file that is not whole safetensors; no weight is read."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = damage(file) or f"is cut or damaged ({error})"
        raise UserError(f"cannot load {file}: it {reason}: copy it anew from where the model came") from error


def damage(file: Path) -> str | None:
    """The common reasons for a file that holds something else than its name says."""
    with file.open("rb") as content:
        start = content.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself (`git lfs pull` fetches it)"
    return "is a web page, not the file itself" if start.lstrip().startswith(b"<") else None


def non_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights that hold NaN or infinity."""

    def is_finite(value: Tensor) -> bool:
        value = value.float() if value.element_size() == 1 else value  # torch has no minimum of float8
        return all(bool(extreme.isfinite()) for extreme in value.detach().aminmax())

    return [name for name, value in weights.items() if value.is_floating_point() and value.numel() and not is_finite(value)]


def check_finite(name: object, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError for loaded weights that hold NaN or infinity."""
    if bad := non_finite(weights):
        half = "" if weights[bad[0]].dtype != torch.float16 else " in float16, whose largest number is 65504"
        raise UserError(
            f"cannot load {name}: {len(bad)} of its weights are not finite{half}, such as {bad[0]}: give a model whose "
            "training did not diverge, in a precision that holds its weights"
        )


def rounded(network: N, dtype: torch.dtype) -> N:
    """A copy of the network as it is saved. Raises UserError for weights that are not finite, in this dtype or at all."""
    copied = nn.Module.to(copy.deepcopy(network), dtype)
    check_saved(copied.state_dict(), network.state_dict())
    return copied


def check_saved(weights: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """before: the same weights as they were trained."""
    bad = non_finite(weights)
    if diverged := non_finite({name: before[name] for name in bad}):
        raise UserError(
            f"{len(diverged)} of the weights to save are not finite, such as {diverged[0]}, and nothing is saved: go on from a "
            "checkpoint before the loss grew, with a lower model.optimizer.lr"
        )
    if bad:
        dtype, extreme = str(weights[bad[0]].dtype).removeprefix("torch."), before[bad[0]].abs().max()
        raise UserError(
            f"{len(bad)} of the weights to save are too large for {dtype}, such as {bad[0]} ({extreme:.3g}), and nothing is "
            "saved: save them by `python -m lcm.export run=<folder> dtype=bfloat16`"
        )


def check_is_clip(folder: Path) -> None:
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    name = next(iter(config.get("architectures") or ()), kind or "CLIPTextModel")
    if kind not in CLIP_TYPES and (kind or not name.startswith("CLIP")):
        raise UserError(f"{folder} holds a {name}: only CLIP's text encoders are read, give a pipeline that has one")


def load_tokenizer(tokenizer_class: Any, folder: Path, text_config: PretrainedConfig) -> Any:
    """Load the tokenizer of a text encoder. tokenizer_class: a class of transformers. The encoder's length cuts captions.

    Raises UserError for a tokenizer of another class, and for one without the text encoder's vocabulary. transformers makes an
    empty tokenizer of a folder without files, and splits words into letters without their merges.
    """
    if tokenizer_class is not CLIPTokenizer:
        with explained(folder):
            tokenizer = tokenizer_class.from_pretrained(folder)
        if not 0.9 * text_config.vocab_size <= len(tokenizer) <= text_config.vocab_size:
            raise UserError(unlike(folder, len(tokenizer), text_config.vocab_size))
        return tokenizer
    settings = read_json(folder / "tokenizer_config.json")
    name = settings.get("tokenizer_class") or "CLIPTokenizer"
    if name not in CLIP_TOKENIZERS:
        raise UserError(f"{folder} holds a {name}: only CLIP's tokenizers are read, give a pipeline that has one")
    files = [folder / "tokenizer.json"]
    if not files[0].is_file():
        files = [folder / "vocab.json", folder / "merges.txt"]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{folder} lacks its vocabulary: copy tokenizer.json, or vocab.json and merges.txt, from where the pipeline came "
            f"(missing: {', '.join(missing)})"
        )
    for file in files:
        if reason := damage(file):
            raise UserError(f"cannot load {file}: it {reason}: copy it anew from where the pipeline came")
    read_json(files[0])
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise UserError(
            f"cannot load {folder}: it is not a CLIP tokenizer ({type(error).__name__}: {' '.join(str(error).split())}): "
            "copy it anew from where the pipeline came"
        ) from error
    check_vocabulary(folder, tokenizer, text_config.vocab_size)
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


def unlike(folder: Path, known: int, vocab_size: int) -> str:
    return (
        f"{folder} knows {known} tokens, the text encoder beside it {vocab_size}: give the tokenizer that the text encoder was "
        "trained with"
    )


def check_vocabulary(folder: Path, tokenizer: CLIPTokenizer, vocab_size: int) -> None:
    """A text encoder's vocabulary may be padded by a few tokens; each longer token is made by a merge."""
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:
        raise UserError(unlike(folder, len(tokenizer), vocab_size))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    longer = {token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1} - set(tokenizer.all_special_tokens)
    unmade = longer - {"".join(merge) for merge in model["merges"]}
    if len(unmade) > 0.1 * len(longer):
        raise UserError(
            f"{folder} makes {len(longer) - len(unmade)} of its {len(longer)} longer tokens: its merges are cut, copy them "
            "anew from where the pipeline came"
        )
