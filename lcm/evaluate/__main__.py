"""FID, KID, CMMD and CLIP score of models x step counts x w: `python -m lcm.evaluate entries.LCM.pipeline=<folder>`.

Images become features in chunks, each a file named by all that it depends on. Any number of processes share out the chunks and
meet in these files alone; what is there is not drawn again, after a kill or for other metrics.
"""

from types import GenericAlias
from typing import Annotated

from lcm.app.cli import Program, build, build_all
from lcm.core.numbers import Count, Dtype, Limit, NonNegative, Seed

TEXTS = str | list[str]
program = Program(
    "evaluate",
    grid_rows=Count,
    batch_size=Count,
    chunk=Count,
    resolution=Count | None,
    entries=GenericAlias(dict, (str, "lcm.evaluate.jobs.Entry")),
    w=float | list[float],
    metrics=list[str],
    shards=TEXTS,
    reference=TEXTS | None,
    prompts=TEXTS,
    samples=Annotated[int, Limit(2)],
    seed=Seed,
    output=str,
    dtype=Dtype,
    patience=NonNegative,
    name=str,
)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import logging
import time
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from tqdm import tqdm

from lcm.app.images import resized
from lcm.app.inputs import output_folder, pick_device, read_prompts
from lcm.core.errors import UserError
from lcm.data.captions import read_captions
from lcm.data.source import Source
from lcm.evaluate import report
from lcm.evaluate.features import METRICS, Extractor, joined, scores
from lcm.evaluate.jobs import SHOWN, Cell, Chunk, choose_resolution, chunks_of, load_models, make_cells

log = logging.getLogger(__name__)


def make_prompts(cfg: DictConfig) -> tuple[list[str], int]:
    """`samples` prompts, the known ones again and again if they are fewer, and how many are different."""
    known = read_prompts(cfg.prompts, lambda: read_captions(Source.of_option(cfg, "shards", build(cfg.cache)), cfg.samples))[
        : cfg.samples
    ]
    if not known:
        raise UserError(f"there are no captions in prompts={cfg.prompts} (shards={cfg.shards}): give others")
    return [known[i % len(known)] for i in range(cfg.samples)], len(known)


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
    if not cfg.metrics:
        raise UserError(f"metrics=[] measures nothing: choose among {', '.join(METRICS)}")
    if unknown := [name for name in cfg.metrics if name not in METRICS]:
        raise UserError(f"metrics has {unknown[0]!r}, which is none of {', '.join(METRICS)}")
    if cfg.samples < 2 or cfg.grid_rows > SHOWN:
        raise UserError(f"samples={cfg.samples} and grid_rows={cfg.grid_rows}: at least 2 samples, at most {SHOWN} rows")


def warnings(extract: Extractor, samples: int, real: int, cells: Sequence[Cell]) -> list[str]:
    dimensions = (extract.fid or extract.clip).num_features
    others = {cell.name: cell.size for cell in cells if cell.size != extract.resolution}
    found = [f"{name} is drawn at {size} px and resized to {extract.resolution} px." for name, size in others.items()]
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
    folder, device = output_folder(cfg.output), pick_device(cfg.device, cfg.local_rank)
    output_folder(cfg.features, "features")
    prompts, different = make_prompts(cfg)
    backbone, fid_backbone, models = build(cfg.backbone), build(cfg.get("fid_backbone")), load_models(cfg, device)
    cfg.resolution = choose_resolution(cfg, models)
    extract = Extractor(backbone, fid_backbone, resolution=cfg.resolution).to(device)
    cells = make_cells(cfg, models, extract)
    chunks = [chunk for cell in cells for chunk in chunks_of(cell, prompts, cfg)]
    if cfg.rank:
        return draw(chunks[cfg.rank :: cfg.world_size], extract, cfg.batch_size, quiet=True)
    reference = "reference" if cfg.reference else "shards"
    real = extract.reference(Source.of_option(cfg, reference, build(cfg.cache)), cfg.reference_cache)
    found = warnings(extract, cfg.samples, len(real["clip"]), cells)
    draw(chunks[:: cfg.world_size], extract, cfg.batch_size, quiet=False)
    wait(chunks, cfg.patience)
    rows, shown = [], []
    for cell in cells:
        parts = [load_file(chunk.file) for chunk in chunks if chunk.cell is cell]
        images = torch.cat([part.pop("images") for part in parts if "images" in part])
        shown.append(resized(images[: cfg.grid_rows], cfg.resolution))
        values = scores(joined(parts), real, cfg.metrics, device)
        rows.append({"name": cell.name, "steps": cell.steps, "w": cell.w, **values})
    footer = report.footer(cfg, extract, real=real, different=different, reference=str(cfg[reference]), warnings=found)
    report.write(folder, rows, footer, shown, prompts, cfg, build_all(cfg.get("logger")))


@program
@torch.inference_mode()
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
