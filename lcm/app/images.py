"""Images on disk: labelled grids, and PNG files with their settings."""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lcm.runtime.atomic_io import whole_file

TITLES = {"consistency": "LCM", "tcd": "TCD", "ddim": "DDIM", "heun": "Heun", "dpm_solver_pp_2m": "DPM++ 2M"}  # by sampler
LONGEST = 4000  # characters after which a label is cut: a row shows fewer


def to_pil(image: Tensor) -> Image.Image:
    """Return a PIL image of uint8 `[3, H, W]`."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def resized(images: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """Return uint8 images `[B, 3, size, size]` of uint8 `[B, 3, H, W]`: antialiased bicubic as Pillow, or plain bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    mode = "bicubic" if antialias else "bilinear"
    x = F.interpolate(images.float(), (size, size), mode=mode, antialias=antialias, align_corners=False)
    return x.round().clamp(0, 255).byte()


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as texts for PNG chunks."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def save_png(image: Image.Image, path: Path, **settings: Any) -> None:
    """Write a PNG atomically, with the settings in its text chunks."""
    with whole_file(path) as file:
        write_png(image, file, **settings)


def write_png(image: Image.Image, file: BinaryIO, **settings: Any) -> None:
    """Write a PNG with the settings in its text chunks.

    The prompt is the chunk `caption`, because ComfyUI takes a chunk `prompt` for a graph of its own.
    """
    info = PngInfo()
    for name, text in as_text(settings).items():
        info.add_itxt("caption" if name == "prompt" else name, text)
    if "prompt" in settings:
        info.add_itxt("parameters", parameters(settings))
    image.save(file, "PNG", pnginfo=info)


def parameters(settings: Mapping[str, Any]) -> str:
    """Return the text by which A1111, Forge and ComfyUI show and repeat the settings of an image."""
    height, width = settings.get("size", (None, None))
    values = {
        "Steps": settings.get("steps"),
        "Sampler": sampler_title(settings.get("sampler")),
        "CFG scale": None if settings.get("w") is None else f"{settings['w'] + 1:g}",
        "Seed": settings.get("seed"),
        "Size": None if width is None else f"{width}x{height}",
        "Model hash": settings.get("model"),
        "Model": None if "pipeline" not in settings else Path(str(settings["pipeline"])).name,
        "Denoising strength": settings.get("strength"),
    }
    line = ", ".join(f"{name}: {quoted(value)}" for name, value in values.items() if value is not None)
    return f"{settings['prompt']}\nNegative prompt: {settings.get('negative', '')}\n{line}"


def sampler_title(sampler: Any) -> str | None:
    """Return the common name of a sampler. sampler: its name in `lcm.json`, or the node of its configuration."""
    if isinstance(sampler, Mapping):
        sampler = sampler.get("solver", sampler)["_target_"].rpartition(".")[2]
    return TITLES.get(str(sampler), sampler)


def quoted(value: Any) -> str:
    """Return a value of `parameters`, in quotes if it contains a separator."""
    return json.dumps(str(value)) if set(str(value)) & set(',:\n"') else str(value)


def grid(
    rows: Sequence[Tensor],
    row_labels: Sequence[str | Sequence[str]],
    column_labels: Sequence[str] = (),
    *,
    cell: int = 128,
    gap: int = 4,
) -> Image.Image:
    """Return a labelled grid. rows: uint8 `[columns, 3, H, W]` each. Small images are enlarged to `cell` pixels, unsmoothed.

    A label is cut to the height of its row and to the width of its column. Several labels of one row share its height.
    """
    width = max(cell, rows[0].shape[-1])
    height = round(width * rows[0].shape[-2] / rows[0].shape[-1])
    font = label_font(max(11, width // 9))
    line_height = font.getbbox("A")[3] + 2  # Pillow's distance of lines
    left = 2 * width + 3 * gap
    heads = [[line for part in label.split("\n") for line in wrap(part, font, width, 3)] for label in column_labels]
    top = int(line_height * max(map(len, heads), default=0)) + 2 * gap
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, lines in enumerate(heads):
        x = left + c * (width + gap) + width // 2
        draw.multiline_text((x, gap), "\n".join(lines), fill="black", font=font, anchor="ma", align="center", spacing=2)
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (height + gap)
        texts = [label] if isinstance(label, str) else label
        limit = max(1, int(height // line_height) // max(1, len(texts)))
        lines = [line for text in texts for line in wrap(text, font, 2 * width, limit)]
        draw.multiline_text((gap, y + height // 2), "\n".join(lines), fill="black", font=font, anchor="lm", spacing=2)
        for c, image in enumerate(row):
            picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + c * (width + gap), y))
    return canvas


@cache
def font_file() -> tuple[Path, frozenset[int]]:
    """Return matplotlib's font file and its characters. The font has most alphabets. Pillow's own font lacks accents."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    file = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return file, frozenset(FT2Font(str(file)).get_charmap())


@cache
def label_font(height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file()[0], height)


def drawable(text: str) -> str:
    """Return the text with escapes, such as \\u732b, for characters that the font lacks."""
    characters = font_file()[1]
    return "".join(c if ord(c) in characters else c.encode("unicode_escape").decode() for c in text)


def wrap(text: str, font: Any, width: float, limit: int | None = None) -> list[str]:
    """Return the text in lines of at most `width` pixels. Wider words are broken. Lines after `limit` are cut."""
    lines = [""]
    for word in text[: LONGEST if limit else None].split():
        alone = drawable(word)
        rest = f"{lines[-1]} {alone}".strip()
        if font.getlength(alone) <= width < font.getlength(rest):
            lines.append("")
            rest = alone
        while font.getlength(rest) > width and len(rest) > 1:
            count = max(1, bisect_right(range(1, len(rest)), width, key=lambda n: font.getlength(rest[:n])))
            lines[-1:], rest = [rest[:count], ""], rest[count:]
        lines[-1] = rest
        if limit and len(lines) > limit:
            break
    if limit and len(lines) > limit:
        last = lines[limit - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: limit - 1], f"{last}..."]
    return lines


def steps_label(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def columns_to_rows(columns: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of `grid` for columns of images, `[rows, 3, H, W]` each."""
    return list(torch.stack(list(columns), dim=1))


def log_picture(logger: Any, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture to wandb or TensorBoard. Loggers without pictures ignore it."""
    if hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
