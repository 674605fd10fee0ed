"""Evaluation jobs: one per model, step count and w, split into chunks of images whose features are cached on disk."""

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
from lcm.app.inputs import read_adapters
from lcm.app.pipelines import find_pipeline
from lcm.app.targets import CONF
from lcm.core.errors import NonFiniteError, UserError
from lcm.core.numbers import Count
from lcm.evaluate.features import Extractor, joined, save
from lcm.models.text_to_image import Sampler, TextToImage
from lcm.runtime.atomic_io import digest

log = logging.getLogger(__name__)
GRID_IMAGES = 32  # first images of a job that are cached for the grid
# Part of the cache key. Raise it when a code change alters the images or features of the same seed and prompt: in the noise,
# samplers, guidance, text encoding, decoding or resizing. Cached features of other versions are ignored.
CACHE_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """The configuration of one model in the table."""

    pipeline: str
    steps: Count | list[Count]
    sampler: str | dict[str, Any] | None = None
    w: float | list[float] | None = None
    size: int | list[int] | None = None
    label: str | None = None
    lora: str | list[str] | None = None


@dataclass(frozen=True)
class Job:
    """One model at one step count and w, drawn at `size` pixels per side. Image i has seed `seed + i`.

    option: the key of its entry. folder: the cache of its features, one file per chunk.
    """

    option: str
    name: str
    seed: int
    steps: int
    w: float
    model: TextToImage
    sampler: Sampler | None
    size: int
    folder: Path

    @property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `TextToImage.latents`."""
        return {"steps": self.steps, "w": self.w, "sampler": self.sampler, "size": self.size}

    def chunks(self, prompts: list[str], length: int) -> "list[Chunk]":
        return [Chunk(self, start, prompts[start : start + length]) for start in range(0, len(prompts), length)]


@dataclass(frozen=True)
class Chunk:
    """The images `[start, start + len(prompts))` of a job."""

    job: Job
    start: int
    prompts: list[str]

    @property
    def file(self) -> Path:
        return self.job.folder / f"{self.start:06d}-{digest([self.prompts, self.job.seed])}.safetensors"

    def draw(self, extract: Extractor, batch_size: int, bar: tqdm) -> None:
        """Draw the images and save their features, with the images of the grid."""
        job, images, features = self.job, [], []
        seeds = [job.seed + self.start + i for i in range(len(self.prompts))]
        try:
            for i, batch in enumerate(job.model.images(self.prompts, seeds, batch_size=batch_size, **job.options)):
                features.append(extract(batch, self.prompts[i * batch_size :][: len(batch)]))
                images.append(batch[: max(GRID_IMAGES - self.start - i * batch_size, 0)].cpu())
                bar.update(len(batch) * job.steps)
        except NonFiniteError as error:
            raise NonFiniteError(f"{job.name} at {job.steps} steps and w = {job.w:g}: {error}") from error
        grid_images = {"images": torch.cat(images)} if self.start < GRID_IMAGES else {}
        description = {"name": job.name, "steps": job.steps, "w": job.w, "seeds": seeds[0]}
        save(self.file, {**joined(features), **grid_images}, description)


def named_entries(cfg: DictConfig) -> dict[str, Any]:
    """Return the entries of the table and the teacher of metrics `against: teacher`, by the configuration's keys."""
    entries = {f"entries.{name}": entry for name, entry in cfg.entries.items()}
    return entries if cfg.get("teacher") is None else {**entries, "teacher": cfg.teacher}


def load_models(cfg: DictConfig, device: str) -> dict[str, TextToImage]:
    """Return the model of each entry, by the keys of `named_entries`. Entries with equal weights share a model.

    `last` in an entry is replaced by its path.
    """
    loaded: dict[str, TextToImage] = {}
    models: dict[str, TextToImage] = {}
    for option, entry in named_entries(cfg).items():
        entry.pipeline, lora = find_pipeline(entry.pipeline, cfg.paths.runs), read_adapters(entry.get("lora"))
        key = digest([entry.pipeline, lora])
        if key not in loaded:
            loaded[key] = TextToImage.load(entry.pipeline, device=device, dtype=getattr(torch, cfg.dtype), lora=lora)
        models[option] = loaded[key]
    if not cfg.entries:
        raise UserError("there is nothing to evaluate: give entries, e.g. entries.LCM.pipeline=<folder>")
    return models


def choose_resolution(cfg: DictConfig, models: dict[str, TextToImage]) -> int:
    """Return the pixels per side at which images are compared: `resolution`, or the common size of all entries."""
    if cfg.resolution is not None:
        return cfg.resolution
    sizes = {models[f"entries.{name}"].size(entry.get("size"), f"entries.{name}.size") for name, entry in cfg.entries.items()}
    height, width = sorted(sizes)[0]
    if len(sizes) > 1 or height != width:
        listed_sizes = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise UserError(f"the entries draw {listed_sizes} px images: set resolution=<pixels> to compare squares of one size")
    return height


def choose_size(option: str, entry: Any, model: TextToImage, resolution: int, draw_at: str) -> int:
    """Return the pixels per side at which an entry is drawn: its own `size`, or as `draw_at` says."""
    if entry.get("size") is not None or draw_at == "model":
        height, width = model.size(entry.get("size"), f"{option}.size")
        if height != width:
            raise UserError(f"{option}.size={[height, width]}: metrics compare squares: give one number")
        return height
    size, _ = model.size(resolution, "resolution")
    trained = model.net.config["sample_size"]
    if isinstance(trained, int) and (native := trained * model.codec.factor) != size:
        log.warning(
            "%s draws %d px images with a model of %d px images: %s.size=%d draws at the model's own size",
            option, size, native, option, native,
        )  # fmt: skip
    return size


def make_jobs(cfg: DictConfig, models: dict[str, TextToImage], extract: Extractor) -> list[Job]:
    """Return the jobs of `named_entries`. Raise UserError for a job that its model or sampler does not support.

    The teacher's seeds differ from those of the entries: images of equal seeds are similar, which would lower the distance.
    """
    unique_models = {id(model): model for model in models.values()}
    identities = {key: model.identity() for key, model in unique_models.items()}
    jobs = []
    for option, entry in named_entries(cfg).items():
        model, sampler = models[option], make_sampler(option, entry.get("sampler"))
        size, ws = choose_size(option, entry, model, extract.resolution, cfg.draw_at), listed(entry.get("w", cfg.w))
        for key, values in (("steps", listed(entry.steps)), ("w", ws)):
            if repeated := [value for value, count in Counter(values).items() if count > 1]:
                raise UserError(f"{option}.{key} has {repeated[0]:g} twice: give each value once")
        for w in ws:
            model.check_w(w, f"{option}.w")
            for steps in listed(entry.steps):
                model.timesteps(steps, sampler)  # raises UserError
                settings = {"sampler": plain(entry.get("sampler")), "steps": steps, "w": float(w), "size": size}
                drawing = {**identities[id(model)], **settings, "dtype": cfg.dtype, "version": CACHE_VERSION}
                folder = Path(cfg.features, digest([drawing, extract.identity]))
                name = str(entry.get("label", option.removeprefix("entries.")))
                seed = cfg.seed + cfg.samples * (option == "teacher")
                jobs.append(Job(option, name, seed, steps, float(w), model, sampler, size, folder))
    if sum(job.option == "teacher" for job in jobs) > 1:
        raise UserError("teacher has several steps or w: give one of each")
    if not jobs:
        raise UserError("there is nothing to evaluate: give an entry steps, e.g. entries.LCM.steps=[4]")
    return jobs


def make_sampler(option: str, sampler: Any) -> Sampler | None:
    """Return the sampler of an entry: a name in conf/sampler, a `_target_`, or None for the model's default."""
    if isinstance(sampler, str):
        names = sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))
        if sampler not in names:
            raise UserError(f"{option}.sampler={sampler} is none of {', '.join(names)}")
        sampler = OmegaConf.load(CONF / "sampler" / f"{sampler}.yaml")
    return build(sampler)


def listed(values: Any) -> list[Any]:
    """Return a list of the values, or of the single value."""
    return list(values) if OmegaConf.is_list(values) else [values]
