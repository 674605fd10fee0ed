"""Inputs of programs: prompts, pictures, adapters, an output folder, a device."""

import csv
import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lcm.core.errors import UserError
from lcm.core.numbers import Engine
from lcm.models.text_to_image import Start
from lcm.runtime.atomic_io import lines_of, text_of, writable

FILE_NAME = re.compile(r"\S+\.(txt|text|csv|tsv|json|jsonl|ndjson|md|yaml|yml|parquet|xlsx|list|tar)", re.IGNORECASE)


def read_prompts(prompts: Any, captions: Callable[[], list[str]], weights: Any = None) -> list[str]:
    """Return the prompts. prompts: a prompt, a list, a .txt file with one prompt per line, or "val". Raises UserError.

    captions: returns the prompts for "val". weights: the weights of the caption fields, which are an error without "val".
    """
    if prompts == "val":
        return captions()
    if weights:
        raise UserError("captions has no effect without prompts=val: set prompts=val, or leave captions out")
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


COLUMNS = {"prompt": str, "seed": int, "w": float, "steps": int}  # the columns of a table of prompts


def read_table(file: str) -> list[dict[str, Any]]:
    """Return the rows of a .csv file with the column `prompt`. Empty cells of `seed`, `w` and `steps` are left out.

    Raises UserError with the number of the line.
    """
    try:
        text = text_of(Path(file).expanduser().read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no prompt file {file}") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"the prompt file {file} cannot be read ({error}): write a table in UTF-8") from error
    table = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    names = [str(name).strip() for name in table.fieldnames or ()]
    if "prompt" not in names or len(set(names)) < len(names) or not set(names) <= COLUMNS.keys():
        raise UserError(
            f"{file} has the columns {', '.join(names) or 'none'}: its first line names prompt, and seed, w or steps"
        )
    table.fieldnames = names
    rows = []
    for row in table:
        cells = {name: value.strip() for name, value in row.items() if name is not None and value is not None and value.strip()}
        try:
            if None in row:
                raise ValueError(f"it has more than {len(names)} cells (quote a prompt with commas)")
            rows.append({"prompt": "", **{name: COLUMNS[name](value) for name, value in cells.items()}})
            if cells.get("steps") == "0" or any(cells.get(name, "").startswith("-") for name in ("seed", "steps")):
                raise ValueError("seed counts from 0 and steps from 1")
        except ValueError as error:
            raise UserError(f"{file}, line {table.line_num}: {error}") from error
    if not rows:
        raise UserError(f"{file} has no prompts: write one per line below the names of the columns")
    return rows


def read_requests(
    prompts: Any, captions: Callable[[], list[str]], weights: Any = None
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the prompts, see `read_prompts`, and the settings of each prompt. Only a .csv file gives settings."""
    if weights or not (isinstance(prompts, str) and prompts.lower().endswith(".csv") and " " not in prompts):
        texts = read_prompts(prompts, captions, weights)
        return texts, [{} for _ in texts]
    rows = read_table(prompts)
    return [row.pop("prompt") for row in rows], rows


def read_adapters(lora: Any) -> dict[str, float]:
    """Return the weight of each file of adapters. lora: `file` or `file:weight`, or a list of these. Raises UserError."""
    weights: dict[str, float] = {}
    for entry in [lora] if isinstance(lora, str) else list(lora or ()):
        file, _, weight = str(entry).rpartition(":")
        try:
            file, value = (file, float(weight)) if file else (weight, 1.0)
        except ValueError:
            file, value = str(entry), 1.0
        if value == 0 or not math.isfinite(value):
            raise UserError(f"lora={entry} has no effect: give a weight such as {file}:1")
        if file in weights:
            raise UserError(f"lora={file} is given twice: give it once, with the sum of the weights")
        weights[os.path.expanduser(file)] = value
    return weights


def read_start(image: str | None, mask: str | None, strength: float | None, size: tuple[int, int]) -> Start | None:
    """Return the picture that sampling starts from, resized and cropped to `size` (height, width). Raises UserError.

    strength: None: 0.6 without a mask, 1 with a mask.
    """
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{name}={value} has no effect without a picture to start from: set image=<file>")
        return None
    picture = read_picture(image, "image")
    mask_picture = None if mask is None else read_picture(mask, "mask")
    if mask_picture is not None and mask_picture.size != picture.size:
        raise UserError(
            f"mask={mask} has {mask_picture.width} x {mask_picture.height} pixels and image={image} {picture.width} x "
            f"{picture.height}: paint the mask on a copy of the image"
        )
    pixels = torch.from_numpy(np.array(fitted(picture, size))).permute(2, 0, 1)
    if mask_picture is None:
        return Start(pixels, 0.6 if strength is None else strength)
    mask_pixels = torch.from_numpy(np.array(fitted(mask_picture.convert("L"), size)))[None].float() / 255
    if not mask_pixels.any():
        raise UserError(f"mask={mask} has no white pixels: paint the area to redraw white")
    return Start(pixels, 1.0 if strength is None else strength, mask_pixels)


def read_picture(file: str, option: str) -> Image.Image:
    """Read a picture as upright RGB. Transparency becomes white."""
    try:
        picture = ImageOps.exif_transpose(Image.open(os.path.expanduser(file), formats=("PNG", "JPEG", "WEBP")))
        if picture.has_transparency_data:
            picture, layer = Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")
            picture.alpha_composite(layer)
        return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{option}={file}: there is no such file") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{option}={file} cannot be read as a picture ({error}): give a PNG, JPEG or WebP file") from error


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture, resized and cropped to `size` (height, width)."""
    return ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)


def is_file_name(prompt: str) -> bool:
    """Return whether a prompt looks like a file: one word with the suffix of a text file, or an existing path."""
    path = os.path.expanduser(prompt)
    return bool(FILE_NAME.fullmatch(prompt)) or os.path.isfile(path) or (os.path.isdir(path) and os.sep in path)


def output_folder(path: str, option: str = "output") -> Path:
    """Make the folder that an option names, and return it. Raises UserError if it cannot be written to."""
    return writable(Path(path), option)


def pick_device(device: str, local_rank: int = 0, engine: Engine = "torch") -> str:
    """Return a torch device. "auto" is the GPU if torch has one. "cuda" is the GPU of this process's local rank."""
    if device == "auto":
        device = "cuda" if engine == "torch" and torch.cuda.is_available() else "cpu"
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
