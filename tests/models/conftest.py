"""Functions that save pipelines as a training does."""

from pathlib import Path
from typing import Any

import torch

from lcm.core.objectives.denoising import ddim_scheduler
from lcm.core.process import VP, Process
from lcm.models.pipeline import find, load_family, load_network
from lcm.models.saving import save_pipeline


def save_teacher(
    folder: Path,
    net: Any,
    base: Path,
    prediction_type: str = "epsilon",
    process: Process | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> str:
    """Save a teacher, and return its folder."""
    scheduler = ddim_scheduler(process or VP(), prediction_type)
    options = {"family": load_family(str(base)), "base": find(str(base)), "scheduler": scheduler}
    save_pipeline(folder, net, **options, metadata={"sampler": "ddim", **metadata}, dtype=dtype)
    return str(folder)


def save_student(
    folder: Path,
    base: Path,
    prediction_type: str = "epsilon",
    process: Process | None = None,
    *,
    net: Any = None,
    points: int = 50,
    zero_init: bool = False,
    dtype: torch.dtype = torch.float32,
    **metadata: Any,
) -> str:
    """Save a student of latent consistency distillation, by default with random weights for w, and return its folder."""
    family = load_family(str(base))
    torch.manual_seed(0)
    net = family.with_w(load_network(str(base)), zero_init=zero_init) if net is None else net
    config = {"prediction_type": prediction_type, "original_inference_steps": points}
    scheduler = "LCMScheduler", {**(process or VP()).config, **config}
    options = {"family": family, "base": find(str(base)), "scheduler": scheduler}
    save_pipeline(folder, net, **options, metadata={"sampler": "consistency", "points": points, **metadata}, dtype=dtype)
    return str(folder)
