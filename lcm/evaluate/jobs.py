"""What an evaluation draws: cells of its table, each in chunks of images whose features are files of their own."""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lcm.app.cli import build
from lcm.app.composition import plain
from lcm.app.pipelines import find_pipeline
from lcm.app.targets import CONF
from lcm.core.errors import NonFiniteError, UserError
from lcm.core.numbers import Count
from lcm.evaluate.features import Extractor, joined, save
from lcm.models.text_to_image import Sampler, TextToImage
from lcm.runtime.atomic_io import digest

log = logging.getLogger(__name__)
SHOWN = 32  # images of a cell that are kept for grids


@dataclass(frozen=True)
class Entry:
    """The configuration of a model to be measured."""

    pipeline: str
    steps: Count | list[Count]
    sampler: str | dict[str, Any] | None = None
    w: float | list[float] | None = None
    size: int | list[int] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Cell:
    """One model at one step count and w, drawn at `size` pixels a side; `folder` has its features, a file a chunk."""

    name: str
    steps: int
    w: float
    model: TextToImage
    sampler: Sampler | None
    size: int
    folder: Path


@dataclass(frozen=True)
class Chunk:
    """The images `[first, first + len(prompts))` of a cell; image i has seed `seed + i`."""

    cell: Cell
    first: int
    prompts: list[str]
    seed: int

    @property
    def file(self) -> Path:
        return self.cell.folder / f"{self.first:06d}-{digest([self.prompts, self.seed])}.safetensors"

    def draw(self, extract: Extractor, batch_size: int, bar: tqdm) -> None:
        seeds = [self.seed + self.first + i for i in range(len(self.prompts))]
        cell, shown, parts = self.cell, [], []
        options: dict[str, Any] = {"steps": cell.steps, "w": cell.w, "sampler": cell.sampler, "size": cell.size}
        try:
            for i, images in enumerate(cell.model.images(self.prompts, seeds, batch_size=batch_size, **options)):
                parts.append(extract(images, self.prompts[i * batch_size :][: len(images)]))
                shown.append(images[: max(SHOWN - self.first - i * batch_size, 0)].cpu())
                bar.update(len(images) * cell.steps)
        except NonFiniteError as error:
            raise NonFiniteError(f"{cell.name} at {cell.steps} steps and w = {cell.w:g}: {error}") from error
        kept = {"images": torch.cat(shown)} if self.first < SHOWN else {}
        save(self.file, {**joined(parts), **kept}, {"name": cell.name, "steps": cell.steps, "w": cell.w, "seeds": seeds[0]})


def load_models(cfg: DictConfig, device: str) -> dict[str, TextToImage]:
    """The entries' models by path, which the entries then have in the place of "last"."""
    models: dict[str, TextToImage] = {}
    for entry in cfg.entries.values():
        path = entry.pipeline = find_pipeline(entry.pipeline, cfg.paths.runs)
        if path not in models:
            models[path] = TextToImage.load(path, device=device, dtype=getattr(torch, cfg.dtype))
    if not models:
        raise UserError("there is nothing to evaluate: give entries, e.g. entries.LCM.pipeline=<folder>")
    return models


def choose_resolution(cfg: DictConfig, models: dict[str, TextToImage]) -> int:
    """Return the pixels a side at which images are compared: as configured, or the one size of all entries."""
    if cfg.resolution is not None:
        return cfg.resolution
    sizes = {models[entry.pipeline].size(entry.get("size"), f"entries.{name}.size") for name, entry in cfg.entries.items()}
    height, width = sorted(sizes)[0]
    if len(sizes) > 1 or height != width:
        given = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise UserError(f"the entries draw {given} px images: set resolution=<pixels> to compare squares of one size")
    return height


def choose_size(name: str, entry: Any, model: TextToImage, resolution: int) -> int:
    """Return the pixels a side at which an entry is drawn: its own `size`, or those at which images are compared."""
    asked, own = entry.get("size"), model.net.config["sample_size"]
    if asked is None:
        size, _ = model.size(resolution, "resolution")
        if isinstance(own, int) and own * model.codec.factor != size:
            log.warning(
                "entries.%s draws %d px images by a model of %d px images: entries.%s.size=%d draws at the model's own size",
                name, size, own * model.codec.factor, name, own * model.codec.factor,
            )  # fmt: skip
        return size
    height, width = model.size(asked, f"entries.{name}.size")
    if height != width:
        raise UserError(f"entries.{name}.size={asked}: metrics compare squares, give one number")
    return height


def make_cells(cfg: DictConfig, models: dict[str, TextToImage], extract: Extractor) -> list[Cell]:
    """Every entry x w x steps. Raises UserError, before any drawing, for what cannot be drawn."""
    makes = {path: drawn_by(model, cfg.dtype) for path, model in models.items()}
    cells = []
    for name, entry in cfg.entries.items():
        sampler, model, ws = make_sampler(name, entry.get("sampler")), models[entry.pipeline], listed(entry.get("w", cfg.w))
        size = choose_size(name, entry, model, extract.resolution)
        for option, values in (("steps", listed(entry.steps)), ("w", ws)):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise UserError(f"entries.{name}.{option} has {twice[0]:g} twice: each belongs in the table once")
        for w in ws:
            model.check_w(w, f"entries.{name}.w")
            for steps in listed(entry.steps):
                model.check_steps(steps, sampler)
                options = {"sampler": plain(entry.get("sampler")), "steps": steps, "w": float(w), "size": size}
                facts = {**makes[entry.pipeline], **options}
                folder = Path(cfg.features, digest([facts, extract.facts]))
                cells.append(Cell(str(entry.get("label", name)), steps, float(w), model, sampler, size, folder))
    if not cells:
        raise UserError("there is nothing to evaluate: give entries, e.g. entries.LCM.pipeline=<folder>")
    return cells


def make_sampler(name: str, sampler: Any) -> Sampler | None:
    """sampler: a name in conf/sampler, a `_target_`, or None for the model's natural one."""
    if isinstance(sampler, str):
        known = sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))
        if sampler not in known:
            raise UserError(f"entries.{name}.sampler={sampler} is none of {', '.join(known)}")
        sampler = OmegaConf.load(CONF / "sampler" / f"{sampler}.yaml")
    return build(sampler)


def drawn_by(model: TextToImage, dtype: str) -> dict[str, Any]:
    """Return the identity of the weights and of the sampling code. An image depends on it beside prompt, seed, size, steps,
    w and sampler."""
    root = Path(__file__).parents[1]
    files = [file for part in ("core", "models", "models/families") for file in sorted((root / part).glob("*.py"))]
    return {
        **model.identity(),
        "dtype": dtype,
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
    }


def listed(values: Any) -> list[Any]:
    return list(values) if OmegaConf.is_list(values) else [values]


def chunks_of(cell: Cell, prompts: list[str], cfg: DictConfig) -> list[Chunk]:
    return [Chunk(cell, i, prompts[i : i + cfg.chunk], cfg.seed) for i in range(0, len(prompts), cfg.chunk)]
