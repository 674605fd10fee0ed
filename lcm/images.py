"""Images on disk: labelled grids, and PNGs that say how they were made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lcm.files import whole_file


def to_pil(image: Tensor) -> Image.Image:
    """uint8 `[3, H, W]` -> PIL."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def resized(images: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """uint8 `[B, 3, H, W]` -> uint8 `[B, 3, size, size]`: antialiased bicubic as in Pillow, or plain bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    mode = "bicubic" if antialias else "bilinear"
    x = F.interpolate(images.float(), (size, size), mode=mode, antialias=antialias, align_corners=False)
    return x.round().clamp(0, 255).byte()


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings as a PNG's text chunks have them."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def save_png(image: Image.Image, path: Path, **settings: Any) -> None:
    """Write a PNG, whole or not at all, with the prompt and settings in its text chunks.

    `parameters` is the chunk that image viewers of the field read.
    """
    info = PngInfo()
    for name, text in as_text(settings).items():
        info.add_itxt(name, text)
    if "prompt" in settings:
        rest = ", ".join(f"{name}: {value}" for name, value in settings.items() if name != "prompt")
        info.add_itxt("parameters", f"{settings['prompt']}\n{rest}")
    with whole_file(path) as file:
        image.save(file, "PNG", pnginfo=info)


def grid(
    rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str] = (), *, cell: int = 128, gap: int = 4
) -> Image.Image:
    """A labelled grid: `rows[r]` is uint8 `[columns, 3, H, W]`; small images are enlarged to a width of `cell`, unsmoothed."""
    width = max(cell, rows[0].shape[-1])
    height = round(width * rows[0].shape[-2] / rows[0].shape[-1])
    letters = max(11, width // 9)
    font = ImageFont.load_default(letters)
    left = int(max(font.getlength(line) for label in row_labels for line in wrap(label, font, 2 * width))) + 3 * gap
    top = (letters + 3) * max((label.count("\n") + 1 for label in column_labels), default=0) + 2 * gap
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + columns * (width + gap), int(top) + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, label in enumerate(column_labels):
        x = left + c * (width + gap) + width // 2
        draw.multiline_text((x, gap), label, fill="black", font=font, anchor="ma", align="center", spacing=2)
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = int(top) + r * (height + gap)
        text = "\n".join(wrap(label, font, 2 * width))
        draw.multiline_text((gap, y + height // 2), text, fill="black", font=font, anchor="lm", spacing=2)
        for c, image in enumerate(row):
            picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + c * (width + gap), y))
    return canvas


def wrap(text: str, font: Any, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def steps_label(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def columns_to_rows(columns: Sequence[Tensor]) -> list[Tensor]:
    """Column-wise batches `[rows, 3, H, W]`, one a column, -> the rows that `grid` takes."""
    return list(torch.stack(list(columns), dim=1))
