"""Images from prompts: `python sample.py pipeline=runs/lcd_mini/0/model prompts='red apple' steps=4 w=2`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count, Dtype, Seed

COUNTS = dict.fromkeys(("steps", "images_per_prompt", "batch_size", "grid_rows"), Count)
TYPES = {"prompts": str | list[str], "pipeline": str, "w": float | None, "output": str | None, "compile": bool, "negative": str}
program = Program("sample", seed=Seed, dtype=Dtype, **COUNTS, **TYPES)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from lcm.app.composition import plain
from lcm.app.image_folder import Pictures
from lcm.app.inputs import output_folder, pick_device, read_prompts
from lcm.app.pipelines import find_pipeline
from lcm.data.captions import read_captions
from lcm.data.source import Source
from lcm.models.text_to_image import TextToImage
from lcm.runtime.atomic_io import digest


@program
@torch.inference_mode()
def main(cfg: DictConfig) -> None:
    """Sample every prompt `images_per_prompt` times. Write each PNG as it is drawn, then a grid."""
    if cfg.output is not None:
        output_folder(cfg.output)
    source = Source.of_option(cfg, "val_shards", build(cfg.cache)) if cfg.prompts == "val" else None
    prompts = read_prompts(cfg.prompts, lambda: read_captions(source), cfg.captions)
    name = find_pipeline(cfg.pipeline, cfg.paths.runs)
    print(f"model:   {name}")
    model = TextToImage.load(name, device=pick_device(cfg.device), dtype=getattr(torch, cfg.dtype), compile=cfg.compile)
    sampler, size = build(cfg.sampler), model.size(cfg.size)
    w = float((4 if model.takes_w else 0) if cfg.w is None else cfg.w)
    model.check_w(w)
    model.check_negative(cfg.negative, w)
    model.check_steps(cfg.steps, sampler)
    settings = {"steps": cfg.steps, "w": w, "sampler": plain(cfg.sampler) or "auto", "size": list(size), "dtype": cfg.dtype}
    settings |= {"negative": cfg.negative, "pipeline": name, "model": digest(model.identity())}
    pictures = Pictures(prompts, cfg.images_per_prompt, cfg.seed, settings)
    folder = pictures.folder(cfg.output, "outputs/sample")
    missing = pictures.missing(folder)
    options = dict(steps=cfg.steps, w=w, sampler=sampler, size=size, negative=cfg.negative, batch_size=cfg.batch_size)
    batches = model.images([pictures.prompt(i) for i in missing], [cfg.seed + i for i in missing], **options)
    with tqdm(total=len(missing), unit="image", desc="sampling", disable=not missing) as bar:
        for number, batch in enumerate(batches):
            for i, image in zip(missing[number * cfg.batch_size :], batch, strict=False):
                pictures.save(folder, i, image)
            bar.update(len(batch))
    pictures.save_grid(folder, cfg.grid_rows)
    there = f" ({len(pictures) - len(missing)} were there)" if len(missing) < len(pictures) else ""
    print(f"images:  {folder}/00000.png to {len(pictures) - 1:05d}.png{there}\ngrid:    {folder}/grid.png")


if __name__ == "__main__":
    main()
