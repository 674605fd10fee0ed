"""The modules on the tiny pipeline, its shards as data, and a silent CPU trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lcm.core import losses, solvers, timesteps
from lcm.core.batch import LatentBatch
from lcm.core.objectives.consistency_models import consistency_distillation, consistency_training
from lcm.core.objectives.denoising import denoising
from lcm.core.objectives.distillation import latent_consistency_distillation
from lcm.core.objectives.finetuning import latent_consistency_finetuning
from lcm.core.random import generator
from lcm.core.schedule import NoiseSchedule
from lcm.data.codec import LatentCodec
from lcm.data.datamodule import ShardDataModule
from lcm.models.pipeline import load_codec, load_unet
from lcm.modules.base import TrainedModule
from lcm.modules.consistency_models import ConsistencyModelDistillation, ConsistencyModelTraining
from lcm.modules.diffusion import LatentDiffusion
from lcm.modules.distillation import LatentConsistencyDistillation
from lcm.modules.finetuning import LatentConsistencyFineTuning
from lcm.modules.guided_distillation import GuidedDistillation
from lcm.modules.lora import LoRADistillation
from lcm.modules.lr_schedules import constant

Make = Callable[..., Any]


def common(**options: Any) -> dict[str, Any]:
    lr, fused = options.pop("lr", 1e-3), options.pop("fused", True)
    return {"optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0, fused=fused), "lr_schedule": constant, **options}


@pytest.fixture
def training(tiny_pipeline: Path) -> Make:
    """`training(kind, **options)`: a new module of one of the kinds, always with the same initial weights."""
    return partial(new_module, tiny_pipeline)


def new_module(tiny_pipeline: Path, kind: str, **options: Any) -> TrainedModule:
    torch.manual_seed(0)
    base, net, options = str(tiny_pipeline), load_unet(str(tiny_pipeline)), common(**options)
    if kind == "diffusion":
        return LatentDiffusion(net, NoiseSchedule(), pipeline=base, **{"objective": denoising, "eval_ema": 0.9, **options})
    if kind == "guided":
        return GuidedDistillation(net, NoiseSchedule(), teacher=base, **{"steps": [4, 2, 1], **options})
    if kind == "cd":
        method = {"teacher": base, "objective": consistency_distillation, "solver": solvers.heun}
        return ConsistencyModelDistillation(net, NoiseSchedule(), **{"loss": losses.l2, **method, **options})
    if kind == "ct":
        method = {"pipeline": base, "objective": consistency_training, "loss": losses.l2}
        return ConsistencyModelTraining(net, NoiseSchedule(), **{**method, **options})
    grid = {"timesteps": timesteps.grid, "loss": partial(losses.huber, c=0.1)}
    if kind == "distillation":
        method = {"teacher": base, "objective": latent_consistency_distillation, "solver": solvers.ddim}
        return LatentConsistencyDistillation(net, NoiseSchedule(), **{**grid, **method, **options})
    if kind == "lora":
        method = {"teacher": base, "objective": latent_consistency_distillation, "solver": solvers.ddim, "rank": 4}
        return LoRADistillation(net, NoiseSchedule(), **{**grid, **method, **options})
    method = {"student": base, "objective": latent_consistency_finetuning}
    return LatentConsistencyFineTuning(net, NoiseSchedule(), **{**grid, **method, **options})


@pytest.fixture(scope="session")
def codec(tiny_pipeline: Path) -> LatentCodec:
    return load_codec(str(tiny_pipeline))


@pytest.fixture
def data(shards: Path, codec: LatentCodec) -> Make:
    """`data(**options)`: the OpenMoji shards as latent batches, or as pixels with codec=None."""

    def make(**options: Any) -> ShardDataModule:
        options = {"codec": codec, "resolution": 32, "batch_size": 4, "num_workers": 0, "shuffle": 64, **options}
        return ShardDataModule(f"{shards}/train-*.tar", **options)

    return make


@pytest.fixture
def fit(tmp_path: Path) -> Make:
    """`fit(module, data, max_steps, ckpt_path=None, **trainer options)` -> the trainer."""

    def run(module: L.LightningModule, data: Any, max_steps: int, ckpt_path: str | None = None, **options: Any) -> L.Trainer:
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        options = {
            "accelerator": "cpu",
            "max_epochs": -1,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
            **silent,
            **options,
        }
        trainer = L.Trainer(max_steps=max_steps, **options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture(scope="session")
def batch() -> LatentBatch:
    """A batch of no data in particular."""
    rng = generator("cpu", "batch")
    z0, cond, uncond = (torch.randn(shape, generator=rng) for shape in ((4, 4, 8, 8), (4, 16, 16), (1, 16, 16)))
    return LatentBatch(z0, cond, uncond, list("abcd"), list("abcd"))
