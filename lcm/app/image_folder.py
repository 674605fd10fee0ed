"""A folder of pictures, one file each. None is drawn twice, and a picture of another call is never overwritten."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lcm.app.images import as_text, grid, save_png, to_pil
from lcm.app.inputs import output_folder
from lcm.core.errors import UserError
from lcm.runtime.run_dir import new_run, run_names

GRID = "grid.png"


@dataclass(frozen=True)
class Pictures:
    """`repeats` pictures of each prompt. Picture i has seed `seed + i`. Each file holds its prompt, seed and settings.

    settings: common to all pictures of a call. "model" identifies the weights, "pipeline" is only their name.
    """

    prompts: list[str]
    repeats: int
    seed: int
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.prompts) * self.repeats

    def prompt(self, i: int) -> str:
        return self.prompts[i // self.repeats]

    def folder(self, output: str | None, parent: str) -> Path:
        """Return the folder to write to, without pictures of other settings. Raises UserError.

        output: the folder that the user names. parent: the folder of numbered folders, one for each call without an output.
        The same call resumes in its folder.
        """
        if output is not None:
            folder = output_folder(output)
            if difference := self.difference(folder):
                raise UserError(
                    f"{folder} has pictures of other settings, {difference}: give another output folder, or empty it"
                )
            return folder
        folders = output_folder(parent)
        for name in reversed(run_names(folders)):
            folder = folders / name
            files, count = numbered(folder), text_of(folder / GRID).get("images", str(len(self)))
            if files and int(files[-1].stem) < len(self) and count == str(len(self)) and not self.difference(folder):
                return folder
        return folders / new_run(folders)

    def difference(self, folder: Path) -> str | None:
        """Say how the first picture of other settings in the folder differs."""
        for file in [*numbered(folder), *folder.glob(GRID)]:
            expected = self.identity(int(file.stem) if file.stem.isdigit() else len(self))
            text = text_of(file)
            for name, value in expected.items():
                if text.get(name) != value:
                    return f"such as {file.name} ({name} is {short(text.get(name, 'missing'))} there, {short(value)} here)"
        return None

    def identity(self, i: int) -> dict[str, str]:
        """Return the text that identifies picture i. The grid, i = len(self), is identified by the settings."""
        common = {name: value for name, value in self.settings.items() if name != "pipeline"}
        return as_text({"prompt": self.prompt(i), "seed": self.seed + i, **common} if i < len(self) else common)

    def missing(self, folder: Path) -> list[int]:
        present = {int(file.stem) for file in numbered(folder)}
        return [i for i in range(len(self)) if i not in present]

    def save(self, folder: Path, i: int, image: Tensor) -> None:
        file = file_of(folder, i)
        if file.exists():
            raise UserError(f"another program has written {file} meanwhile: run this again with another output=")
        save_png(to_pil(image), file, prompt=self.prompt(i), seed=self.seed + i, **self.settings)

    def save_grid(self, folder: Path, rows: int) -> None:
        """Write a grid with a row for each of the first prompts, read from the folder."""
        prompts = self.prompts[:rows]
        images = torch.stack([read(file_of(folder, i)) for i in range(len(prompts) * self.repeats)])
        save_png(
            grid(list(images.unflatten(0, (len(prompts), self.repeats))), prompts),
            folder / GRID,
            images=len(self),
            **self.settings,
        )


def file_of(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def numbered(folder: Path) -> list[Path]:
    return sorted(
        (file for file in folder.glob("*.png") if re.fullmatch(r"\d{5,}", file.stem)), key=lambda file: int(file.stem)
    )


def text_of(file: Path) -> dict[str, Any]:
    """Return a PNG's text chunks without reading its pixels. Return an empty mapping for another file."""
    try:
        with Image.open(file) as image:
            return {str(name): value for name, value in image.info.items()}
    except (OSError, UnidentifiedImageError):
        return {}


def read(file: Path) -> Tensor:
    """Return the pixels, uint8 `[3, H, W]`."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
