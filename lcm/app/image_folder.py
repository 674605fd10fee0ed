"""The output folder of `sample.py`: one file per picture. Existing pictures are neither drawn again nor overwritten."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from lcm.app.images import as_text, grid, save_png, to_pil
from lcm.app.inputs import output_folder
from lcm.core.errors import UserError
from lcm.models.text_to_image import Start, TextToImage
from lcm.runtime.run_dir import new_run, run_names

GRID = "grid.png"


@dataclass(frozen=True)
class Pictures:
    """`repeats` pictures of each prompt. Picture i has seed `seed + i`. Each file holds its prompt, seed and settings.

    settings: the settings of all pictures of a call. "model" identifies the weights, "pipeline" is only their name.
    row_settings: the settings of each prompt, which replace these settings. "seed" is the seed of the prompt's first picture.
    """

    prompts: list[str]
    repeats: int
    seed: int
    settings: Mapping[str, Any]
    row_settings: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.prompts) * self.repeats

    def prompt(self, i: int) -> str:
        return self.prompts[i // self.repeats]

    def seed_of(self, i: int) -> int:
        seed = self.row_settings[i // self.repeats].get("seed") if self.row_settings else None
        return self.seed + i if seed is None else seed + i % self.repeats

    def settings_of(self, i: int) -> dict[str, Any]:
        row = self.row_settings[i // self.repeats] if self.row_settings else {}
        return {**self.settings, **{name: value for name, value in row.items() if name != "seed"}}

    def batches(self, numbers: list[int], size: int) -> Iterator[list[int]]:
        """Yield the pictures in batches of at most `size` that share their settings."""
        for _, alike in groupby(numbers, lambda i: sorted(self.settings_of(i).items(), key=itemgetter(0))):
            while batch := list(islice(alike, size)):
                yield batch

    def folder(self, output: str | None, parent: str) -> Path:
        """Return a folder to write to, without pictures of other settings. Raises UserError.

        output: the user's folder; None: a numbered folder in `parent`. The same call resumes in the same numbered folder.
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
        """Describe the first picture in the folder that was drawn with other settings."""
        for file in [*numbered(folder), *folder.glob(GRID)]:
            expected = self.identity(int(file.stem) if file.stem.isdigit() else len(self))
            text = text_of(file)
            for name, value in expected.items():
                if text.get(name) != value:
                    return f"such as {file.name} ({name} is {short(text.get(name, 'missing'))} there, {short(value)} here)"
        return None

    def identity(self, i: int) -> dict[str, str]:
        """Return the text that identifies picture i. The grid, i = len(self), is identified by the settings."""
        settings = (
            {**self.settings_of(i), "caption": self.prompt(i), "seed": self.seed_of(i)} if i < len(self) else self.settings
        )
        return as_text({name: value for name, value in settings.items() if name != "pipeline"})

    def missing(self, folder: Path) -> list[int]:
        """Return the numbers of the pictures that are not in the folder."""
        present = {int(file.stem) for file in numbered(folder)}
        return [i for i in range(len(self)) if i not in present]

    def draw(self, folder: Path, numbers: list[int], model: TextToImage, batch_size: int, **options: Any) -> None:
        """Draw the pictures of these numbers, and write each batch. options: arguments of `TextToImage.latents`."""
        with tqdm(total=len(numbers), unit="image", desc="sampling", disable=not numbers) as bar:
            for batch in self.batches(numbers, batch_size):
                settings = {name: self.settings_of(batch[0])[name] for name in ("steps", "w", "negative")}
                prompts, seeds = [self.prompt(i) for i in batch], [self.seed_of(i) for i in batch]
                [images] = model.images(prompts, seeds, batch_size=batch_size, **settings, **options)
                for i, image in zip(batch, images, strict=True):
                    self.save(folder, i, image)
                bar.update(len(batch))

    def save(self, folder: Path, i: int, image: Tensor) -> None:
        file = file_of(folder, i)
        if file.exists():
            raise UserError(f"another program has written {file} meanwhile: run this command again with another output=")
        save_png(to_pil(image), file, prompt=self.prompt(i), seed=self.seed_of(i), **self.settings_of(i))

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


def start_settings(start: Start | None) -> dict[str, Any]:
    """Return the settings of pictures that start from a picture. Digests stand for its pixels and its mask."""
    if start is None:
        return {}
    pixels = {"start": start.image, "mask": start.mask}
    named = {name: sha256(value.numpy().tobytes()).hexdigest()[:16] for name, value in pixels.items() if value is not None}
    return {"strength": start.strength, **named}


def file_of(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def numbered(folder: Path) -> list[Path]:
    """Return the numbered pictures of a folder, in order."""
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
