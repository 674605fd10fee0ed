"""Inputs of programs: prompts, an output folder, a device."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcm.core.errors import UserError
from lcm.runtime.atomic_io import lines_of, writable

FILE_NAME = re.compile(r"\S+\.(txt|text|csv|tsv|json|jsonl|ndjson|md|yaml|yml|parquet|xlsx|list|tar)", re.IGNORECASE)


def read_prompts(prompts: Any, captions: Callable[[], list[str]], weights: Any = None) -> list[str]:
    """Return the prompts. prompts: one, a list, a .txt file with one per line, or "val" for the validation captions.

    weights: the choice among the validation captions, which other prompts refuse.
    """
    if prompts == "val":
        return captions()
    if weights:
        raise UserError("captions chooses among the captions of val_shards: set prompts=val, or leave captions out")
    if isinstance(prompts, str) and prompts.lower().endswith(".txt"):
        try:
            lines = lines_of(Path(prompts).expanduser())
        except FileNotFoundError:
            raise UserError(f"there is no prompt file {prompts}") from None
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"the prompt file {prompts} cannot be read ({error}): write one prompt per line, in UTF-8"
            ) from error
        if not lines:
            raise UserError(f"{prompts} has no prompts: write one per line")
        return lines
    texts = [prompts] if isinstance(prompts, str | int | float) else list(prompts or ())
    if not texts or prompts == "":
        raise UserError(f"prompts={prompts} is empty: give a prompt, a list, or a .txt file; prompts=[''] draws without a text")
    for prompt in texts:
        if not isinstance(prompt, str | int | float):
            raise UserError(f"prompts={prompts} holds {prompt!r}, which is not text: give texts only")
        if is_file_name(str(prompt)):
            raise UserError(
                f"prompts={prompt} names a file: give a .txt file with one prompt per line, or write this prompt in such a file"
            )
    return [str(prompt) for prompt in texts]


def is_file_name(prompt: str) -> bool:
    """Whether a prompt looks like a file: one word with the suffix of a text file, or an existing path."""
    path = os.path.expanduser(prompt)
    return bool(FILE_NAME.fullmatch(prompt)) or os.path.isfile(path) or (os.path.isdir(path) and os.sep in path)


def output_folder(path: str, option: str = "output") -> Path:
    return writable(Path(path), option)


def pick_device(device: str, local_rank: int = 0) -> str:
    """Return a torch device. "auto" is the GPU if there is one. "cuda" is the GPU of this process's local rank."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU: use device=cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but torch sees no Apple GPU: use device=cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device={device}: use auto, cuda, cuda:1, cpu or mps") from None
    if device == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return device
