"""What every LightningModule here shares: optimizer, clipping, the non-finite guard, checkpoints of trained tensors only."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lcm.core.random import generator
from lcm.errors import UserError

Optimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
LRSchedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]

LOOK_EVERY = 10  # optimizer steps between two looks at a GPU's gradient norm: each is a wait for the device


class TrainedModule(L.LightningModule):
    """One optimizer over the registered parameters; frozen networks live outside the module tree (see `frozen`).

    optimizer: `params -> Optimizer`; lr_schedule: `(optimizer, max_steps) -> LRScheduler`, stepped every optimizer step.
    clip_norm: gradients are scaled to at most this total norm (by hand: Lightning refuses to clip for a fused optimizer).
    """

    def __init__(self, *, optimizer: Optimizer, lr_schedule: LRSchedule, clip_norm: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.clip_norm, self.seed = clip_norm, seed
        self.frozen: dict[str, nn.Module] = {}  # a plain dict: not in state_dict, DDP, EMA, nor the optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        schedule = self.make_lr_schedule(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained; a group's "lr_scale" multiplies the optimizer's learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device).requires_grad_(False).eval()

    def draws(self, batch_idx: int, stage: str = "train") -> torch.Generator:
        """The randomness of one step: a function of (seed, stage, batch, rank), not of what ran before."""
        return generator(self.device, self.seed, stage, batch_idx, self.global_rank)

    def log_train(self, loss: Tensor, logs: Mapping[str, Tensor], batch_size: int) -> None:
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=batch_size)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip, and let a fused optimizer skip a non-finite update on the device; the host looks when it waits anyway."""
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
        inner = getattr(optimizer, "optimizer", optimizer)
        fused = inner.defaults.get("fused", False)
        if fused:
            inner.found_inf = (~norm.isfinite()).float()
        self.log("train/grad_norm", norm)
        look = not fused or norm.device.type == "cpu" or self.global_step % LOOK_EVERY == 0
        if look and not norm.isfinite():
            raise UserError(
                f"the loss or a gradient became non-finite at step {self.global_step}; no weight was updated with it and the "
                "last checkpoint is sound: lower model.optimizer.lr or set trainer.precision=32-true, then go on with "
                "ckpt_path=last"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        """Once per optimizer step, also under gradient accumulation: where moving averages move."""
