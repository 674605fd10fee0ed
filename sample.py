"""Images from prompts: `python sample.py pipeline=runs/lcd_mini/0/model prompts='red apple' steps=4 w=2`."""

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from lcm.app.cli import build, program
from lcm.app.composition import plain
from lcm.app.image_folder import Pictures
from lcm.app.inputs import one_of_each, output_folder, pick_device, read_prompts
from lcm.app.pipelines import find_pipeline
from lcm.core.numbers import Count, Dtype, Seed
from lcm.data.captions import read_captions
from lcm.data.source import Source
from lcm.models.text_to_image import TextToImage
from lcm.runtime.atomic_io import digest


@program(
    "sample",
    **dict.fromkeys(("images_per_prompt", "batch_size", "grid_rows"), Count),
    **{
        "prompts": str | list[str],
        "pipeline": str,
        "w": float | None,
        "seed": Seed,
        "output": str | None,
        "dtype": Dtype,
        "compile": bool,
    },
)
@torch.inference_mode()
def main(cfg: DictConfig) -> None:
    """Load a pipeline folder, sample every prompt `images_per_prompt` times, write each PNG as it is drawn, then a grid."""
    numbers = ("steps", "seed", "images_per_prompt", "batch_size", "grid_rows")
    one_of_each(cfg, *numbers, *([] if cfg.w is None else ["w"]))
    if cfg.output is not None:
        output_folder(cfg.output)
    prompts = read_prompts(cfg.prompts, lambda: read_captions(Source.of_option(cfg, "val_shards", build(cfg.cache))))
    name = find_pipeline(cfg.pipeline, cfg.paths.runs)
    print(f"model:   {name}")
    model = TextToImage.load(name, device=pick_device(cfg.device), dtype=getattr(torch, cfg.dtype), compile=cfg.compile)
    sampler, size = build(cfg.sampler), model.size(cfg.size)
    w = float((4 if model.takes_w else 0) if cfg.w is None else cfg.w)
    model.check_w(w)
    model.check_steps(cfg.steps, sampler)
    settings = {"steps": cfg.steps, "w": w, "sampler": plain(cfg.sampler) or "auto", "size": list(size), "dtype": cfg.dtype}
    settings |= {"pipeline": name, "model": digest(model.identity())}
    pictures = Pictures(prompts, cfg.images_per_prompt, cfg.seed, settings)
    folder = pictures.folder(cfg.output, "outputs/sample")
    left = pictures.missing(folder)
    options = {"steps": cfg.steps, "w": w, "sampler": sampler, "size": size, "batch_size": cfg.batch_size}
    batches = model.images([pictures.prompt(i) for i in left], [cfg.seed + i for i in left], **options)
    with tqdm(total=len(left), unit="image", desc="sampling", disable=not left) as bar:
        for number, batch in enumerate(batches):
            for i, image in zip(left[number * cfg.batch_size :], batch, strict=False):
                pictures.save(folder, i, image)
            bar.update(len(batch))
    pictures.save_grid(folder, cfg.grid_rows)
    there = f" ({len(pictures) - len(left)} were there)" if len(left) < len(pictures) else ""
    print(f"images:  {folder}/00000.png to {len(pictures) - 1:05d}.png{there}\ngrid:    {folder}/grid.png")


if __name__ == "__main__":
    main()
