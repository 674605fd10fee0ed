"""Images from prompts: `python sample.py pipeline=runs/lcd_mini/0/model prompts='red apple' steps=4 w=2`."""

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from lcm.command_line import build, program
from lcm.core.numbers import Count, Dtype, Seed
from lcm.data.captions import read_captions
from lcm.errors import UserError
from lcm.images import grid, save_png, to_pil
from lcm.inputs import output_folder, pick_device, read_prompts, shards
from lcm.models.generate import LatentModel
from lcm.runs import find_pipeline


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
    """Load a pipeline folder, sample every prompt `images_per_prompt` times, write PNGs and a grid."""
    if not isinstance(cfg.steps, int) or not isinstance(cfg.w, int | float):
        raise UserError("sample.py draws at one steps= and one w=; `python -m lcm.evaluate` compares several")
    folder = output_folder(cfg.output)
    prompts = read_prompts(cfg.prompts, lambda: read_captions(shards(cfg, "val_shards")))
    name = find_pipeline(cfg.pipeline, cfg.paths.runs)
    model = LatentModel.load(name, device=pick_device(cfg.device), dtype=getattr(torch, cfg.dtype), compile=cfg.compile)
    model.check_w(cfg.w)
    repeated = [prompt for prompt in prompts for _ in range(cfg.images_per_prompt)]
    seeds = [cfg.seed + i for i in range(len(repeated))]
    sampler = build(cfg.solver)
    settings = {"pipeline": name, "steps": cfg.steps, "w": cfg.w, "solver": cfg.solver._target_ if sampler else "auto"}
    batches = model.images(repeated, seeds, steps=cfg.steps, w=cfg.w, sampler=sampler, batch_size=cfg.batch_size)
    images = []
    with tqdm(total=len(repeated), unit="image", desc="sampling") as bar:
        for batch in batches:
            for image in batch:
                i = len(images)
                save_png(to_pil(image), folder / f"{i:05d}.png", prompt=repeated[i], seed=seeds[i], **settings)
                images.append(image)
            bar.update(len(batch))
    rows = torch.stack(images).unflatten(0, (len(prompts), cfg.images_per_prompt))[: cfg.grid_rows]
    save_png(grid(list(rows), prompts[: cfg.grid_rows]), folder / "grid.png", **settings)
    print(f"images:  {folder}/00000.png to {len(images) - 1:05d}.png\ngrid:    {folder}/grid.png")


if __name__ == "__main__":
    main()
