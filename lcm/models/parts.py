"""One part of a pipeline folder, read: its configuration, its network with all weights and without code."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lcm.errors import UserError

PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@contextmanager
def explained(name: object) -> Iterator[None]:
    """A library's complaint about a part's files as one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"cannot load {name}: {' '.join(str(error).split())}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): copy it anew from where the pipeline came") from error


def load_network(kind: Any, folder: Path, **options: Any) -> Any:
    """kind: a class of diffusers or transformers, which of missing weights only warn: one leaves them empty, one draws them."""
    variant = variant_in(folder)
    with explained(folder):
        network, info = kind.from_pretrained(folder, use_safetensors=True, variant=variant, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"cannot load {folder}: {len(missing)} of its weights are missing, such as {missing[0]}: copy weights and "
            "config.json anew from where the pipeline came"
        )
    return network


def variant_in(folder: Path) -> str | None:
    """ "fp16" where there is `model.fp16.safetensors` and no `model.safetensors`."""
    variants = [".".join(file.name.split(".")[1:-1]).partition("-")[0] for file in folder.glob("*.safetensors")]
    if not variants:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        cure = "copy the whole pipeline, or save_pretrained() it as safetensors if it has .bin files only"
        if pickled:
            cure = (
                f"{pickled[0]} may hold code; if you trust it, load it with its library and save_pretrained() it as safetensors"
            )
        raise UserError(f"cannot load {folder}: it has no .safetensors file: {cure}")
    return min(variants) or None
