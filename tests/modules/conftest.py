"""Fixtures: modules on the tiny pipeline, shards as data, and a silent CPU trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lcm.core import losses, solvers, timesteps
from lcm.core.batch import LatentBatch
from lcm.core.objectives.consistency_models import ConsistencyDistillation, ConsistencyTraining
from lcm.core.objectives.denoising import Denoising
from lcm.core.objectives.distillation import LatentConsistencyDistillation
from lcm.core.objectives.distribution_matching import ImprovedDistributionMatching, TrajectoryDistributionMatching
from lcm.core.objectives.finetuning import LatentConsistencyFinetuning
from lcm.core.objectives.pcm import PhasedConsistencyDistillation
from lcm.core.objectives.tcd import TrajectoryConsistencyDistillation
from lcm.core.random import generator
from lcm.data.datamodule import ShardDataModule
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import load_codec, load_network, load_process
from lcm.modules.consistency import ConsistencyModule
from lcm.modules.distribution_matching import FakeScore, MatchingModule
from lcm.modules.guided_distillation import GuidedDistillation
from lcm.modules.latent import LatentModule
from lcm.modules.lr_schedules import constant

Make = Callable[..., Any]


def common(**options: Any) -> dict[str, Any]:
    lr, fused = options.pop("lr", 1e-3), options.pop("fused", True)
    return {"optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0, fused=fused), "lr_schedule": constant, **options}


@pytest.fixture
def training(tiny_pipeline: Path) -> Make:
    """`training(kind, **options)` returns a new module of that kind, always with the same initial weights."""
    return partial(new_module, tiny_pipeline)


def new_module(pipeline: Path, kind: str, **options: Any) -> Any:
    """Return a module whose training starts from the pipeline.

    An option replaces an argument of the module. An option `objective.<name>` replaces an argument of the objective.
    """
    torch.manual_seed(0)
    base = str(pipeline)
    parts = {name.partition(".")[2]: options.pop(name) for name in list(options) if name.startswith("objective.")}
    net, process, options = load_network(base), load_process(base), common(**options)
    if kind == "diffusion":
        return LatentModule(
            net, process, pipeline=base, **{"objective": partial(Denoising, **parts), "eval_ema": 0.9, **options}
        )
    if kind == "guided":
        return GuidedDistillation(net, process, pipeline=base, **{"steps": [4, 2, 1], **options})
    matching = {"tdm": TrajectoryDistributionMatching, "dmd2": ImprovedDistributionMatching}
    if kind in matching:
        fake = partial(FakeScore, optimizer=options["optimizer"], lr_schedule=constant, ratio=2)
        arguments = {"loss": losses.huber, "fake": fake, "w_min": 2.0, "w_max": 14.0, **options}
        return MatchingModule(net, process, pipeline=base, objective=partial(matching[kind], **parts), **arguments)
    guided = {"w_min": 2.0, "w_max": 14.0, "timesteps": timesteps.grid, "loss": partial(losses.huber, c=0.1)}
    methods: dict[str, dict[str, Any]] = {
        "distillation": {"objective": LatentConsistencyDistillation, "solver": solvers.ddim, **guided},
        "tcd": {"objective": TrajectoryConsistencyDistillation, "solver": solvers.ddim, **guided},
        "pcm": {"objective": PhasedConsistencyDistillation, "solver": solvers.ddim, "ema_decay": 0.0, **guided},
        "lora": {"objective": LatentConsistencyDistillation, "solver": solvers.ddim, "adapters": {"rank": 4}, "ema_decay": 0.0,
                 **guided},
        "finetuning": {"objective": LatentConsistencyFinetuning, **guided},
        "cd": {"objective": ConsistencyDistillation, "solver": solvers.heun, "loss": losses.l2},
        "ct": {"objective": ConsistencyTraining, "ema_decay": 0.9, "loss": losses.l2},
    }  # fmt: skip
    method = methods[kind]
    return ConsistencyModule(
        net, process, pipeline=base, **{**method, "objective": partial(method["objective"], **parts), **options}
    )


@pytest.fixture(scope="session")
def codec(tiny_pipeline: Path) -> LatentCodec:
    return load_codec(str(tiny_pipeline))


@pytest.fixture
def data(shards: Path, codec: LatentCodec) -> Make:
    """`data(**options)` returns the OpenMoji shards as latent batches, or as pixels with codec=None."""

    def make(**options: Any) -> ShardDataModule:
        options = {"codec": codec, "resolution": 32, "batch_size": 4, "num_workers": 0, "shuffle": 64, **options}
        return ShardDataModule(f"{shards}/train-*.tar", **options)

    return make


@pytest.fixture
def fit(tmp_path: Path) -> Make:
    """`fit(module, data, max_steps, ckpt_path=None, **trainer options)` trains the module and returns the trainer."""

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
    """Return a batch of random latents and text embeddings."""
    rng = generator("cpu", "batch")
    z0, cond, uncond = (torch.randn(shape, generator=rng) for shape in ((4, 4, 8, 8), (4, 16, 16), (1, 16, 16)))
    return LatentBatch(z0, {"states": cond}, {"states": uncond}, list("abcd"), list("abcd"))
