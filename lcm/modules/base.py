"""What every LightningModule here shares: optimizer, clipping, the non-finite guard, checkpoints of trained tensors only."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lcm.core.numbers import Positive, Seed, Whole
from lcm.core.random import generator, own_rows
from lcm.errors import UserError

Optimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
LRSchedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]
Draws = TypeVar("Draws")  # a dataclass of tensors, a row a sample

LOOK_EVERY = 10  # optimizer steps between two looks at a GPU's gradient norm: each is a wait for the device


class TrainedModule(L.LightningModule):
    """One optimizer over the registered parameters; frozen networks live outside the module tree (see `frozen`).

    optimizer: `params -> Optimizer`; lr_schedule: `(optimizer, max_steps) -> LRScheduler`, stepped every optimizer step.
    clip_norm: gradients are scaled to at most this total norm (by hand: Lightning refuses to clip for a fused optimizer); None
    leaves them as they are.
    skip_non_finite: so many updates in a row may have a loss or gradient that is not finite; they are left out and counted,
    one more stops the training. Data and learning rate go on with the step's number, as if the update had been made.
    """

    def __init__(
        self,
        *,
        optimizer: Optimizer,
        lr_schedule: LRSchedule,
        clip_norm: Positive | None = 1.0,
        skip_non_finite: Whole = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.clip_norm = float("inf") if clip_norm is None else clip_norm
        self.skip_non_finite, self.seed = skip_non_finite, seed
        self.left_out = False  # whether the host knows that the last update was left out
        self.gate: Tensor | None = None  # 0 where the device alone knows, else 1
        self.frozen: dict[str, nn.Module] = {}  # a plain dict: not in state_dict, DDP, EMA, nor the optimizer

    def configure_model(self) -> None:
        """Where a strategy that shards (`trainer=fsdp`) has its networks sharded; nothing for the others."""
        if self.device_mesh is not None:
            raise UserError(f"{type(self).__name__} cannot be sharded: train it with trainer=ddp")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        optimizer.register_load_state_dict_post_hook(lay_out_as_parameters)
        schedule = scheduled(self.make_lr_schedule, optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained; a group's "lr_scale" multiplies the optimizer's learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["method"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for another method's, whose weights may even fit."""
        own, found = type(self).__name__, checkpoint.get("method", type(self).__name__)
        if found != own:
            raise UserError(
                f"the checkpoint is of {found}, this training is a {own}: give it a name= of its own, or another ckpt_path"
            )

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device).requires_grad_(False).eval()
        self.skipped = self.in_a_row = torch.zeros((), device=self.device)  # updates left out since this start, and just now

    def on_train_start(self) -> None:
        steps = self.all_gather(torch.tensor(self.global_step, device=self.device))
        assert isinstance(steps, Tensor)
        if steps.min() != steps.max():
            raise UserError(
                f"the ranks start at different steps, {sorted(set(steps.tolist()))}: all must see one folder paths.runs"
            )
        self.switch_optimizer("train")

    def on_validation_start(self) -> None:
        self.switch_optimizer("eval")

    def on_validation_end(self) -> None:
        self.switch_optimizer("train")

    def on_train_end(self) -> None:
        self.switch_optimizer("eval")

    def switch_optimizer(self, mode: str) -> None:
        """Tell an optimizer that has modes (schedulefree's) whether the weights are trained or used."""
        for optimizer in self.trainer.optimizers:
            if switch := getattr(optimizer, mode, None):
                switch()

    def draws(self, draw: Callable[..., Draws], z0: Tensor, batch_idx: int, stage: str = "train", **options: Any) -> Draws:
        """This rank's rows of `draw(z0 of all ranks, generator, **options)`.

        A function of (seed, stage, batch) and of a sample's place in the global batch, not of what ran before nor of how many
        ranks share the batch: each draws for all, 64 kB a 512 px sample.
        """
        rank, world_size = self.global_rank, self.world_size
        everyone = z0[:1].expand(world_size * len(z0), *z0.shape[1:])
        drawn = draw(everyone, self.rng(batch_idx, stage), **options)
        return type(drawn)(**{name: own_rows(values, rank, world_size) for name, values in vars(drawn).items()})

    @property
    def world_size(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def rng(self, batch_idx: int, stage: str = "train") -> torch.Generator:
        return generator(self.device, self.seed, stage, batch_idx, 0)  # 0: once the rank; kept so that recorded runs repeat

    def log_train(self, loss: Tensor, logs: Mapping[str, Tensor], batch_size: int) -> None:
        if self.world_size > 1 and (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            loss = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")  # `sync_dist` would wait each step
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=batch_size)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip, and leave a non-finite update out: on the device for a fused optimizer, where the host looks now and then.

        A gradient is averaged over the ranks, so that all find the same. Once too many were bad, all are left out until the
        host looks.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm)
        if isinstance(norm, DTensor):  # of sharded gradients: the same on every rank
            norm = norm.full_tensor()
        self.log("train/grad_norm", norm)
        bad = ~norm.isfinite()
        self.in_a_row = (self.in_a_row + bad) * (bad | (self.in_a_row > self.skip_non_finite))
        self.skipped = self.skipped + bad
        if self.skip_non_finite:
            self.log("train/skipped_steps", self.skipped)

        inner, step = getattr(optimizer, "optimizer", optimizer), self.global_step + 1
        on_device = self.skips_on_device(inner)
        if not on_device or step % LOOK_EVERY == 0 or step == self.trainer.max_steps:
            self.look()
        self.left_out = not on_device and bool(bad)
        if on_device:
            inner.found_inf = (self.in_a_row > 0).float()
            self.gate = 1 - inner.found_inf
        elif self.left_out:
            inner.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient

    def skips_on_device(self, optimizer: torch.optim.Optimizer) -> bool:
        return bool(optimizer.defaults.get("fused")) and self.device.type != "cpu"

    def look(self) -> None:
        if self.in_a_row > self.skip_non_finite:
            many = f" {self.skip_non_finite + 1} times in a row" if self.skip_non_finite else ""
            raise UserError(
                f"the loss or a gradient became non-finite{many} at step {self.global_step}; no weight was updated with it and "
                "the last checkpoint is sound: lower model.optimizer.lr, set trainer.precision=32-true or leave such steps out "
                "with model.skip_non_finite=3, then go on with ckpt_path=last"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self.left_out:
            self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        """Once per optimizer step, also under gradient accumulation: where moving averages move, by no more than `gate`."""


def scheduled(make: Callable[..., Any], optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """`make(optimizer)`, and max_steps for the one other parameter that it needs: each library has a name of its own for it."""
    [_, *rest] = inspect.signature(make).parameters.values()
    needed = [p.name for p in rest if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(needed) > 1:
        raise UserError(f"model.lr_schedule needs {' and '.join(needed)}: give them, as +model.lr_schedule.{needed[0]}=...")
    return make(optimizer, **dict.fromkeys(needed, max_steps))


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint written on another device may hold moments in another memory format, with which no fused update works."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
