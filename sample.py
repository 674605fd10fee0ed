"""Images from prompts: `python sample.py pipeline=runs/lcd_mini/0/model prompts='red apple' steps=4 w=2`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count, Dtype, Engine, PositiveShare, Seed

COUNTS = dict.fromkeys(("steps", "images_per_prompt", "batch_size", "grid_rows"), Count)
FILES = dict.fromkeys(("image", "mask", "output"), str | None) | {"strength": PositiveShare | None}
TYPES = {"prompts": str | list[str], "pipeline": str, "w": float | None, "compile": bool, "negative": str, **FILES}
program = Program("sample", seed=Seed, dtype=Dtype, engine=Engine, **COUNTS, **TYPES)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import torch
from omegaconf import DictConfig

from lcm.app.composition import plain
from lcm.app.image_folder import Pictures, start_settings
from lcm.app.inputs import output_folder, pick_device, read_adapters, read_requests, read_start
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
    source = Source.from_option(cfg, "val_shards", build(cfg.cache)) if cfg.prompts == "val" else None
    prompts, row_settings = read_requests(cfg.prompts, lambda: read_captions(source), cfg.captions)
    name, lora = find_pipeline(cfg.pipeline, cfg.paths.runs), read_adapters(cfg.lora)
    print(f"model:   {name}")
    options = {"device": pick_device(cfg.device, engine=cfg.engine), "dtype": getattr(torch, cfg.dtype), "compile": cfg.compile}
    model = TextToImage.load(name, **options, lora=lora, engine=cfg.engine)
    sampler, size = build(cfg.sampler), model.size(cfg.size)
    start = read_start(cfg.image, cfg.mask, cfg.strength, size)
    settings = {"steps": cfg.steps, "w": model.default_w if cfg.w is None else cfg.w, "negative": cfg.negative}
    for steps, w in dict.fromkeys((row.get("steps", cfg.steps), row.get("w", settings["w"])) for row in row_settings):
        model.check({**settings, "steps": steps, "w": w}, sampler, start)
    settings |= {"sampler": plain(cfg.sampler) or model.metadata["sampler"], "size": list(size), "dtype": cfg.dtype}
    settings |= {
        "pipeline": name,
        "model": digest(model.identity()),
        **start_settings(start),
        **({"lora": lora} if lora else {}),
    }
    pictures = Pictures(prompts, cfg.images_per_prompt, cfg.seed, settings, row_settings)
    folder = pictures.folder(cfg.output, "outputs/sample")
    missing = pictures.missing(folder)
    pictures.draw(folder, missing, model, cfg.batch_size, sampler=sampler, size=size, start=start)
    pictures.save_grid(folder, cfg.grid_rows)
    existing = f" ({len(pictures) - len(missing)} were there)" if len(missing) < len(pictures) else ""
    print(f"images:  {folder}/00000.png to {len(pictures) - 1:05d}.png{existing}\ngrid:    {folder}/grid.png")


if __name__ == "__main__":
    main()
