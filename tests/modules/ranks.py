"""Train on given batches under a strategy.

test_strategies.py runs this program in two processes, and calls `train` for one process.

`torchrun --standalone --nproc-per-node=2 -m tests.modules.ranks <tiny pipeline> <pixart's> <sd3's> <folder>`.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.random import generator
from lcm.models.quantization import nf4
from lcm.modules.adversary import LatentAdversary
from lcm.modules.latent import LatentModule
from lcm.modules.lr_schedules import constant
from lcm.runtime.checkpoint_io import AtomicCheckpointIO
from lcm.runtime.fsdp import FullySharded
from tests.modules.conftest import new_module
from tests.modules.test_autoencoder import train as train_autoencoder

RANKS, STEPS, HALF = 2, 4, 2
# With AdamW's usual eps of 1e-8 the order of a sum decides the step of a weight whose gradient is nearly zero.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, eps=1e-6, fused=True)
MATCHING = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, eps=1e-5, fused=True)  # 1e-6 is too small on some CPUs
EIGHT_BIT = partial(AdamW8bit, lr=1e-3, weight_decay=0.0, eps=1e-6)
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {  # the shapes of one sample of each pipeline
    "tiny": {"z0": (4, 8, 8), "states": (16, 16)},
    "pixart": {"z0": (4, 8, 8), "states": (6, 32), "mask": (6,)},
    "sd3": {"z0": (16, 4, 4), "states": (6, 48), "pooled": (16,)},
}
STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": FullySharded,
    "folder": lambda: FullySharded(sharded_checkpoints=True),
    "hsdp": lambda: FullySharded(replicas=2),
}


class Batches(IterableDataset):
    """A dataset without a length, like the project's datasets.

    With a length, a resumed training would end too early: Lightning counts the batches before a checkpoint as read.
    """

    def __init__(self, batches: list[LatentBatch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[LatentBatch]:
        return iter(self.batches)


def batch(index: int, rank: int | None, pipeline_name: str = "tiny") -> LatentBatch:
    """Return the two samples of a rank, or the samples of all ranks if `rank` is None."""
    rng, shapes = generator("cpu", "batch", index), SHAPES[pipeline_name]
    drawn = {name: torch.randn(2 * RANKS, *shape, generator=rng) for name, shape in shapes.items()}
    if "mask" in drawn:
        drawn["mask"] = (drawn["mask"] > -0.5).float()
    rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    z0, *conds = (values[rows] for values in drawn.values())
    names = list("abcdefgh"[: 2 * RANKS])[rows]
    uncond = {name: torch.ones(1, *shape) for name, shape in shapes.items() if name != "z0"}
    return LatentBatch(z0, dict(zip(uncond, conds, strict=True)), uncond, names, names)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in state.items()}


def train(
    pipeline: Path,
    kind: str,
    folder: Path,
    strategy: str | None = None,
    *,
    steps: int = STEPS,
    accumulate: int = 1,
    resume: Path | None = None,
    save: Path | None = None,
    poisoned: int | None = None,
    precision: str = "32-true",
    validate: bool = False,
    of: str = "tiny",
    export: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return the losses of this process, the gradient norms and the weights after `steps`.

    strategy: None trains in this process on the batches of all ranks. resume: the path of a checkpoint after `HALF` steps.
    of: the name of the pipeline. export: whether to save the pipeline in `folder` after the training.
    """
    optimizer = MATCHING if kind in ("tdm", "dmd2") else OPTIMIZER
    module = new_module(pipeline, kind, clip_norm=0.05, **{"optimizer": optimizer, **options})
    rank = int(os.environ["LOCAL_RANK"]) if strategy else None
    batches = [batch(i, rank, of) for i in range(HALF * accumulate if resume else 0, STEPS * accumulate)]
    if poisoned is not None and rank == 1:
        batches[poisoned].z0.fill_(float("nan"))
    watch = Losses()
    trainer = L.Trainer(
        accelerator="cpu", devices=RANKS if strategy else 1, strategy=STRATEGIES[strategy]() if strategy else "auto",
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, callbacks=[watch], precision=precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
        check_val_every_n_epoch=None, val_check_interval=2 if validate else None,
    )  # fmt: skip
    loaders = [DataLoader(Batches(part), batch_size=None) for part in (batches, batches[:1])[: 1 + validate]]
    stopped = None
    try:
        trainer.fit(module, *loaders, ckpt_path=resume)
    except UserError as error:
        stopped = str(error)
    if save:
        trainer.save_checkpoint(save)
    if export:
        module.save_model(str(folder / "model"), dtype=torch.float32)
    result = {"losses": watch.losses, "norms": watch.norms, "stopped": stopped, "weights": whole(module.state_dict())}
    return {**result, "sizes": sizes(module)}


def sizes(module: LatentModule) -> dict[str, int]:
    """Return how many bytes of each network this process holds."""
    networks = {**dict(module.named_children()), **module.frozen}
    local = {name: [getattr(p, "_local_tensor", p) for p in network.parameters()] for name, network in networks.items()}
    return {name: sum(p.untyped_storage().nbytes() for p in tensors) for name, tensors in local.items()}


ADVERSARY = partial(LatentAdversary, optimizer=OPTIMIZER, lr_schedule=constant, weight=0.5, channels=8)
REAL_DATA = partial(ADVERSARY, real="data")
SCENARIOS: dict[str, dict[str, Any]] = {
    **{f"{kind}-{s}-{k}": {"kind": kind, "strategy": s, "accumulate": k}
       for kind, k in (("distillation", 1), ("diffusion", 2)) for s in ("ddp", "fsdp")},
    **{f"adversary-{s}": {"kind": "pcm", "strategy": s, "adversary": ADVERSARY} for s in ("ddp", "fsdp")},
    "adversary-pixart": {"kind": "pcm", "strategy": "fsdp", "of": "pixart", "adversary": ADVERSARY},
    "matching-ddp": {"kind": "tdm", "strategy": "ddp"},
    "matching-adapters": {"kind": "tdm", "strategy": "ddp", "adapters": {"rank": 4}},
    "matching-fsdp": {"kind": "dmd2", "strategy": "fsdp", "adversary": REAL_DATA},
    "half-matching": {"kind": "dmd2", "strategy": "folder", "adversary": REAL_DATA, "steps": HALF, "save": "matching.ckpt"},
    "resumed-matching": {"kind": "dmd2", "strategy": "fsdp", "adversary": REAL_DATA, "resume": "matching.ckpt"},
    "hsdp": {"kind": "distillation", "strategy": "hsdp"},
    "recomputed": {"kind": "distillation", "strategy": "fsdp", "gradient_checkpointing": True, "validate": True},
    **{f"{name}-fsdp": {"kind": "distillation", "strategy": "fsdp", "of": name, "export": True} for name in ("pixart", "sd3")},
    "nf4 base": {"kind": "lora", "strategy": "ddp", "quantization": nf4},
    "nf4 teacher": {"kind": "distillation", "strategy": "ddp", "quantization": nf4},
    "8-bit": {"kind": "distillation", "strategy": "ddp", "optimizer": EIGHT_BIT},
    "nf4 shards": {"kind": "distillation", "strategy": "fsdp", "quantization": nf4},
    "8-bit shards": {"kind": "distillation", "strategy": "fsdp", "optimizer": EIGHT_BIT},
    "poisoned": {"kind": "distillation", "strategy": "fsdp", "poisoned": 2},
    "bf16": {"kind": "distillation", "strategy": "fsdp", "precision": "bf16-mixed"},
    **{f"half-{s}": {"kind": "distillation", "strategy": s, "steps": HALF, "save": f"half-{s}.ckpt"}
       for s in ("ddp", "fsdp", "folder")},
    **{f"resumed-{s}-{writer}": {"kind": "distillation", "strategy": s, "resume": f"half-{writer}.ckpt"}
       for s, writer in (("fsdp", "fsdp"), ("folder", "folder"), ("fsdp", "ddp"), ("ddp", "folder"))},
}  # fmt: skip


def main() -> None:
    *pipelines, folder = (Path(arg) for arg in sys.argv[1:])
    for name, options in SCENARIOS.items():
        files = {key: folder / options[key] for key in ("resume", "save") if key in options}
        pipeline = pipelines[list(SHAPES).index(options.get("of", "tiny"))]
        result = train(pipeline, folder=folder / name, **{**options, **files})
        torch.save(result, folder / f"{name}-{os.environ['LOCAL_RANK']}.pt")
    train_autoencoder(pipelines[0], folder / "autoencoder", RANKS)


if __name__ == "__main__":
    main()
