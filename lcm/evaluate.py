"""FID, KID, CMMD and CLIP score of models x step counts x w: `python -m lcm.evaluate entries.LCM.pipeline=<folder>`.

Images become features in chunks, each a file named by all that it depends on. Any number of processes share out the chunks and
meet in these files alone; what is there is not drawn again, after a kill or for other metrics.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tqdm import tqdm

from lcm import report
from lcm.command_line import CONF, build, output_folder, pick_device, program, read_prompts
from lcm.data.captions import read_captions
from lcm.errors import UserError
from lcm.metrics.features import METRICS, Extractor, digest, fingerprint, joined, save, scores
from lcm.models.generate import LatentModel, Sampler
from lcm.runs import find_pipeline

log = logging.getLogger(__name__)
SHOWN = 32  # images of a cell that are kept for grids


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
                cells.append(Cell(name, steps, float(w), model, sampler, folder))
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
    return build(solver) or None


def drawn_by(model: LatentModel, dtype: str) -> dict[str, Any]:
    """What an image depends on besides prompt, seed, steps, w and solver: the weights and the code that draws."""
    root = Path(__file__).parent
    files = [*sorted((root / "core").glob("*.py")), *sorted((root / "models").glob("*.py")), root / "data/codec.py"]
    return {
        "weights": fingerprint(model.unet, *model.students.values(), model.codec.vae, model.codec.text_encoder),
        "schedule": model.schedule.config,
        "facts": model.facts,
        "consistency": model.consistency,
        "dtype": dtype,
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
    }


def listed(values: Any) -> list[Any]:
    return list(values) if OmegaConf.is_list(values) else [values]


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def make_prompts(cfg: DictConfig) -> tuple[list[str], int]:
    """`samples` prompts, the known ones again and again if they are fewer, and how many are different."""
    known = read_prompts(cfg.prompts, lambda: read_captions(cfg.shards, cfg.samples))[: cfg.samples]
    if not known:
        raise UserError(f"there are no captions in prompts={cfg.prompts} (shards={cfg.shards}): give others")
    return [known[i % len(known)] for i in range(cfg.samples)], len(known)


def chunks_of(cell: Cell, prompts: list[str], cfg: DictConfig) -> list[Chunk]:
    return [Chunk(cell, i, prompts[i : i + cfg.chunk], cfg.seed) for i in range(0, len(prompts), cfg.chunk)]


def draw(chunks: Sequence[Chunk], extract: Extractor, batch_size: int, quiet: bool) -> None:
    """The chunks that are not on disk."""
    left = [chunk for chunk in chunks if not chunk.file.is_file()]
    total = sum(len(chunk.prompts) * chunk.cell.steps for chunk in left)
    with tqdm(total=total, unit="network step", desc="drawing", disable=quiet or not left) as bar:
        for chunk in left:
            bar.set_postfix_str(f"{chunk.cell.name}, {chunk.cell.steps} steps")
            chunk.draw(extract, batch_size, bar)


def wait(chunks: Sequence[Chunk], patience: float) -> None:
    """Until the other processes' files are there. Raises UserError when none has come for `patience` seconds."""
    missing = [chunk.file for chunk in chunks if not chunk.file.is_file()]
    with tqdm(total=len(missing), unit="chunk", desc="other processes", disable=not missing) as bar:
        last = time.monotonic()
        while missing:
            time.sleep(0.2)
            count, missing = len(missing), [file for file in missing if not file.is_file()]
            bar.update(count - len(missing))
            last = time.monotonic() if len(missing) < count else last
            if time.monotonic() - last > patience:
                raise UserError(
                    f"no other process has finished a chunk for {patience:g} s and {len(missing)} are missing: "
                    "run the same command again, what is done is kept"
                )


def check(cfg: DictConfig) -> None:
    if unknown := [name for name in cfg.metrics if name not in METRICS]:
        raise UserError(f"metrics has {unknown[0]!r}, which is none of {', '.join(METRICS)}")
    if cfg.samples < 2 or cfg.grid_rows > SHOWN:
        raise UserError(f"samples={cfg.samples} and grid_rows={cfg.grid_rows}: at least 2 samples, at most {SHOWN} rows")


def warnings(extract: Extractor, samples: int, real: int) -> list[str]:
    dimensions = (extract.fid or extract.clip).num_features
    found = []
    if min(samples, real) <= dimensions:
        found.append(f"{min(samples, real)} images do not fill the {dimensions} dimensions of the features: FID is too high")
    if real < samples:
        found.append(f"The reference set has {real} images, fewer than the {samples} drawn.")
    for sentence in found:
        log.warning(sentence)
    return found


def evaluate(cfg: DictConfig) -> None:
    """Draw what is not drawn, score every cell, write the table, plots and grid; process `rank` > 0 only draws its share."""
    check(cfg)
    folder, device = output_folder(cfg.output), pick_device(cfg.device)
    if device == "cuda":
        torch.cuda.set_device(cfg.local_rank % torch.cuda.device_count())
    prompts, different = make_prompts(cfg)
    extract = Extractor(build(cfg.backbone), build(cfg.get("fid_backbone")) or None, resolution=cfg.resolution).to(device)
    cells = make_cells(cfg, extract, device)
    chunks = [chunk for cell in cells for chunk in chunks_of(cell, prompts, cfg)]
    if cfg.rank:
        return draw(chunks[cfg.rank :: cfg.world_size], extract, cfg.batch_size, quiet=True)
    reference = cfg.get("reference") or cfg.shards
    real = extract.reference(reference, cfg.reference_cache, option="reference" if cfg.reference else "shards")
    found = warnings(extract, cfg.samples, len(real["clip"]))
    draw(chunks[:: cfg.world_size], extract, cfg.batch_size, quiet=False)
    wait(chunks, cfg.patience)
    rows, shown = [], []
    for cell in cells:
        parts = [load_file(chunk.file) for chunk in chunks if chunk.cell is cell]
        shown.append(parts[0].pop("images")[: cfg.grid_rows])
        values = scores(joined(parts), real, cfg.metrics, device)
        rows.append({"name": cell.name, "steps": cell.steps, "w": cell.w, **values})
    footer = report.footer(cfg, extract, real=real, different=different, reference=str(reference), warnings=found)
    report.write(folder, rows, footer, shown, prompts, cfg, list(build(cfg.get("logger")).values()))


@program("evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
