"""FID and CLIP score of models x step counts, with a picture: `python -m lcm.evaluate entries.LCM.pipeline=<folder>`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from lcm.command_line import build, output_folder, pick_device, program
from lcm.data.captions import read_captions, read_images
from lcm.errors import UserError
from lcm.images import columns_to_rows, grid
from lcm.metrics.clip import ClipBackbone, clip_score, fid
from lcm.models.generate import LatentModel, Sampler
from lcm.runs import find_pipeline


@dataclass
class Column:
    """One model at one step count."""

    name: str
    steps: int
    fid: float = float("nan")
    clip_score: float = float("nan")


class Scorer:
    """FID against the real images of `shards`, and CLIP score, both on one backbone."""

    def __init__(self, backbone: ClipBackbone, shards: Any, resolution: int) -> None:
        self.fid, self.clip_score, self.count = fid(backbone), clip_score(backbone), 0
        for batch in read_images(shards, resolution=resolution):
            x = batch["x"].to(backbone.mean.device)
            self.fid.update(x, real=True)
            self.clip_score.update(x, batch["captions"])
            self.count += len(x)
        self.real_clip_score = float(self.clip_score.compute())

    def score(self, images: Tensor, captions: list[str]) -> tuple[float, float]:
        """(FID, CLIP score) of uint8 `[N, 3, H, W]`."""
        self.fid.reset()
        self.clip_score.reset()
        for part, texts in zip(images.split(256), batched(captions, 256), strict=True):
            self.fid.update(part, real=False)
            self.clip_score.update(part, texts)
        return float(self.fid.compute()), float(self.clip_score.compute())


def batched(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def draw(
    model: LatentModel, column: Column, captions: list[str], cfg: DictConfig, sampler: Sampler | None, bar: tqdm
) -> Tensor:
    seeds = [cfg.seed + i for i in range(len(captions))]
    parts = []
    for part in model.images(captions, seeds, steps=column.steps, w=cfg.w, sampler=sampler, batch_size=cfg.batch_size):
        parts.append(part)
        bar.update(len(part) * column.steps)
    return torch.cat(parts)


def table(columns: list[Column], footer: str) -> str:
    """The paper's Table 1 in markdown: a row a method, FID and CLIP score at each step count."""
    steps = sorted({column.steps for column in columns})
    lines = [
        "| | "
        + " | ".join(f"FID, {n} step{'s'[: n > 1]}" for n in steps)
        + " | "
        + " | ".join(f"CLIP, {n}" for n in steps)
        + " |",
        "|---" * (1 + 2 * len(steps)) + "|",
    ]
    for name in dict.fromkeys(column.name for column in columns):
        of = {column.steps: column for column in columns if column.name == name}
        fids = [f"{of[n].fid:.2f}" if n in of else "" for n in steps]
        scores = [f"{of[n].clip_score:.2f}" if n in of else "" for n in steps]
        lines.append(f"| {name} | " + " | ".join(fids + scores) + " |")
    return "\n".join([*lines, "", footer, ""])


@program("evaluate")
def main(cfg: DictConfig) -> None:
    """Draw every column, score it, write table.md, table.json and grid.png."""
    folder, device = output_folder(cfg.output), pick_device(cfg.device)
    captions = read_captions(cfg.shards, cfg.samples)
    if len(captions) < cfg.samples:
        raise UserError(f"samples={cfg.samples}, but {cfg.shards} hold {len(captions)} captions: lower samples")
    names = {name: find_pipeline(entry.pipeline, cfg.paths.runs) for name, entry in cfg.entries.items()}
    models = {name: LatentModel.load(path, device=device, dtype=getattr(torch, cfg.dtype)) for name, path in names.items()}
    samplers = {name: build(entry.get("solver")) or None for name, entry in cfg.entries.items()}
    columns = [Column(name, steps) for name, entry in cfg.entries.items() for steps in entry.steps]
    for column in columns:
        models[column.name].sampler(samplers[column.name])[1](column.steps)  # refuses impossible step counts before any work
    backbone = build(cfg.backbone).to(device)
    scorer, shown = Scorer(backbone, cfg.shards, cfg.resolution), []
    with tqdm(total=len(captions) * sum(column.steps for column in columns), unit="network step", desc="drawing") as bar:
        for column in columns:
            bar.set_postfix_str(f"{column.name}, {column.steps} steps")
            images = draw(models[column.name], column, captions, cfg, samplers[column.name], bar)
            column.fid, column.clip_score = scorer.score(images, captions)
            shown.append(images[: cfg.grid_rows])
    footer = (
        f"{cfg.samples} images a cell, w = {cfg.w} (guidance_scale {cfg.w + 1}), {cfg.resolution} px, UNet in {cfg.dtype}. FID "
        f"and CLIP score on {type(backbone.clip).__name__} of `{cfg.backbone.get('pipeline')}`, against {scorer.count} real "
        f"images (whose own CLIP score is {scorer.real_clip_score:.2f})."
    )
    text = table(columns, footer)
    Path(folder, "table.md").write_text(text)
    record = {"columns": [asdict(column) for column in columns], "pipelines": names, "note": footer}
    Path(folder, "table.json").write_text(json.dumps(record, indent=2))
    labels = [f"{column.name}\n{column.steps} step{'s'[: column.steps > 1]}" for column in columns]
    grid(columns_to_rows(shown), captions[: cfg.grid_rows], labels).save(folder / "grid.png")
    print(f"\n{text}\ntable:   {folder}/table.md\npicture: {folder}/grid.png")


if __name__ == "__main__":
    main()
