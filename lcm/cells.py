"""What an evaluation draws: cells of its table, each in chunks of images whose features are files of their own."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from lcm.command_line import build
from lcm.composition import plain
from lcm.core.numbers import Count
from lcm.errors import UserError
from lcm.files import digest
from lcm.metrics.features import Extractor, fingerprint, joined, save
from lcm.models.generate import LatentModel, Sampler
from lcm.runs import find_pipeline
from lcm.targets import CONF

SHOWN = 32  # images of a cell that are kept for grids


@dataclass(frozen=True)
class Entry:
    """What a configuration says of a model to be measured."""

    pipeline: str
    steps: Count | list[Count]
    solver: str | dict[str, Any] | None = None
    w: float | list[float] | None = None
    size: int | list[int] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Cell:
    """One model at one step count and w; `folder` has its features, a file a chunk."""

    name: str
    steps: int
    w: float
    model: LatentModel
    sampler: Sampler | None
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
        batches = cell.model.images(
            self.prompts, seeds, steps=cell.steps, w=cell.w, sampler=cell.sampler, batch_size=batch_size
        )
        for i, images in enumerate(batches):
            parts.append(extract(images, self.prompts[i * batch_size :][: len(images)]))
            shown.append(images[: max(SHOWN - i * batch_size, 0)].cpu())
            bar.update(len(images) * cell.steps)
        kept = {"images": torch.cat(shown)} if self.first == 0 else {}
        save(self.file, {**joined(parts), **kept}, {"name": cell.name, "steps": cell.steps, "w": cell.w, "seeds": seeds[0]})


def make_cells(cfg: DictConfig, extract: Extractor, device: str) -> list[Cell]:
    """Every entry x w x steps. Raises UserError, before any drawing, for what cannot be drawn."""
    models: dict[str, LatentModel] = {}
    makes: dict[str, dict[str, Any]] = {}
    cells = []
    for name, entry in cfg.entries.items():
        path, sampler = find_pipeline(entry.pipeline, cfg.paths.runs), make_sampler(name, entry.get("solver"))
        entry.pipeline = path  # for the record, what "last" was
        if path not in models:
            models[path] = LatentModel.load(path, device=device, dtype=getattr(torch, cfg.dtype))
            makes[path] = drawn_by(models[path], cfg.dtype)
        model, ws = models[path], listed(entry.get("w", cfg.w))
        for option, values in (("steps", listed(entry.steps)), ("w", ws)):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise UserError(f"entries.{name}.{option} has {twice[0]:g} twice: each belongs in the table once")
        for w in ws:
            check_w(name, model, w)
            for steps in listed(entry.steps):
                model.sampler(sampler)[1](steps, model.schedule.num_timesteps)  # refuses a step count that does not fit
                facts = {**makes[path], "solver": plain(entry.get("solver")), "steps": steps, "w": float(w)}
                folder = Path(cfg.features, digest([facts, extract.facts]))
                cells.append(Cell(str(entry.get("label", name)), steps, float(w), model, sampler, folder))
    if not cells:
        raise UserError("there is nothing to evaluate: give entries, e.g. entries.LCM.pipeline=<folder>")
    return cells


def check_w(name: str, model: LatentModel, w: float) -> None:
    if w != 0 and model.consistency and model.unet.config["time_cond_proj_dim"] is None:
        raise UserError(
            f"entries.{name} is a consistency model without an input for w, and its w = {w:g} is not 0: set entries.{name}.w=0"
        )
    model.check_w(w)


def make_sampler(name: str, solver: Any) -> Sampler | None:
    """solver: a name in conf/solver, a `_target_`, or None for the model's natural one."""
    if isinstance(solver, str):
        known = sorted(path.stem for path in (CONF / "solver").glob("*.yaml"))
        if solver not in known:
            raise UserError(f"entries.{name}.solver={solver} is none of {', '.join(known)}")
        solver = OmegaConf.load(CONF / "solver" / f"{solver}.yaml")
    return build(solver)


def drawn_by(model: LatentModel, dtype: str) -> dict[str, Any]:
    """What an image depends on besides prompt, seed, steps, w and solver: the weights and the code that draws."""
    root = Path(__file__).parent
    files = [*sorted((root / "core").glob("*.py")), *sorted((root / "models").glob("*.py"))]
    files += [root / "data/codec.py", root / "data/text.py"]
    return {
        "weights": fingerprint(model.unet, *model.students.values(), model.codec.vae, *model.codec.text.towers),
        "schedule": model.schedule.config,
        "facts": model.facts,
        "consistency": model.consistency,
        "dtype": dtype,
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
    }


def listed(values: Any) -> list[Any]:
    return list(values) if OmegaConf.is_list(values) else [values]


def chunks_of(cell: Cell, prompts: list[str], cfg: DictConfig) -> list[Chunk]:
    return [Chunk(cell, i, prompts[i : i + cfg.chunk], cfg.seed) for i in range(0, len(prompts), cfg.chunk)]
