"""The optimizer of a training: its schedule, gradient clipping and the guard against non-finite losses."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lcm.core.errors import UserError

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]

CHECK_EVERY = 10  # optimizer steps between two checks of a GPU's gradient norm; a check waits for the device


class Optimization(L.Callback):
    """The optimizer of a LightningModule, which returns this from `configure_callbacks`.

    optimizer: `params -> Optimizer`. lr_schedule: `(optimizer, max_steps) -> LRScheduler`, stepped every optimizer step.
    clip_norm: limit of the total gradient norm; None: no clipping. Lightning refuses to clip for a fused optimizer.
    skip_non_finite: number of consecutive updates that may be skipped for a non-finite loss or gradient. One more stops the
    training. The step number, the data and the learning rate advance as if the update had been made.

    A resumed training takes tensors and its step from the checkpoint, and every setting from the configuration.
    """

    def __init__(
        self, optimizer: OptimizerFactory, lr_schedule: ScheduleFactory, clip_norm: float | None, skip_non_finite: int
    ) -> None:
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.clip_norm = float("inf") if clip_norm is None else clip_norm
        self.skip_non_finite = skip_non_finite
        self.skipped_update = False  # the host knows that the last update was skipped
        self.skipped_on_device: Tensor | None = None  # 1.0 if the device skipped the last update, else 0.0; None on the host

    def configure(self, groups: list[dict[str, Any]], max_steps: int) -> dict[str, Any]:
        """Return what `configure_optimizers` returns. A group's "lr_scale" multiplies the optimizer's learning rate."""
        optimizer = self.make_optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        optimizer.register_load_state_dict_pre_hook(self.keep_settings)
        optimizer.register_load_state_dict_post_hook(match_parameter_layout)
        schedule = scheduled(self.make_lr_schedule, optimizer, max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # resume

    def keep_settings(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's optimizer state with the settings of this run in its groups.

        A group may also hold numbers that an optimizer computes (Prodigy's `d`). They are no constructor arguments and stay.
        """
        saved_groups, moments = state["param_groups"], state["state"]
        saved, needed = {name for moment in moments.values() for name in moment}, self.moments(optimizer)
        if saved and not (needed and needed <= saved):
            say(f"resume:  {type(optimizer).__name__} starts without moments: the checkpoint's are another optimizer's")
            saved_groups, moments = [{"params": group["params"]} for group in saved_groups], {}
        settings = {name for cls in type(optimizer).__mro__ for name in inspect.signature(cls).parameters}
        settings = (settings | {"initial_lr"}) - {"params"}
        groups = [
            {**then, **{name: value for name, value in group.items() if name in settings or name not in then}}
            for then, group in zip(saved_groups, optimizer.param_groups, strict=True)
        ]
        return {"state": moments, "param_groups": groups}

    def moments(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """Return the names of the state that the configured optimizer keeps for a parameter."""
        parameter = nn.Parameter(torch.zeros(1, device=optimizer.param_groups[0]["params"][0].device))
        parameter.grad = torch.zeros_like(parameter)
        probe = self.make_optimizer([{"params": [parameter]}])
        probe.step(lambda: 0.0)
        return set(probe.state[parameter])

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []  # `on_train_start` moves the schedule to the checkpoint's step
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                states[callback.state_key]["patience"] = callback.patience  # Lightning would take the checkpoint's

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps = module.all_gather(torch.tensor(trainer.global_step, device=module.device))
        assert isinstance(steps, Tensor)
        if steps.min() != steps.max():
            raise UserError(
                f"the ranks start at different steps, {sorted(set(steps.tolist()))}: all must see the same folder paths.runs"
            )
        schedule: Any = module.lr_schedulers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it has not seen the optimizer steps before the checkpoint
            for _ in range(trainer.global_step):
                schedule.step()
        set_mode(trainer, "train")

    # optimizers with modes

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        set_mode(trainer, "eval")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        set_mode(trainer, "train")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        set_mode(trainer, "eval")

    # clipping and the non-finite guard

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.skipped = self.skipped_in_a_row = torch.zeros((), device=module.device)  # since this start; consecutive

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        """Clip, and skip a non-finite update: on the device for a fused optimizer, which the host checks now and then.

        Gradients are averaged over the ranks, so all ranks decide alike. After too many consecutive skips, the device skips
        every update until the host checks.
        """
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.clip_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        module.log("train/grad_norm", norm)
        bad = ~norm.isfinite()
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * (bad | (self.skipped_in_a_row > self.skip_non_finite))
        self.skipped = self.skipped + bad
        if self.skip_non_finite:
            module.log("train/skipped_steps", self.skipped)

        inner, step = getattr(optimizer, "optimizer", optimizer), trainer.global_step + 1
        on_device = self.skips_on_device(inner, module.device)
        if not on_device or step % CHECK_EVERY == 0 or step == trainer.max_steps:
            self.check_skipped(trainer)
        self.skipped_update = not on_device and bool(bad)
        if on_device:
            inner.found_inf = self.skipped_on_device = (self.skipped_in_a_row > 0).float()
        elif self.skipped_update:
            inner.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient

    def skips_on_device(self, optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
        return bool(optimizer.defaults.get("fused")) and device.type != "cpu"

    def check_skipped(self, trainer: L.Trainer) -> None:
        """Raise UserError after more than `skip_non_finite` consecutive skips."""
        if self.skipped_in_a_row > self.skip_non_finite:
            many = f" {self.skip_non_finite + 1} times in a row" if self.skip_non_finite else ""
            raise UserError(
                f"the loss or a gradient became non-finite{many} at step {trainer.global_step}; no weight was updated with it "
                "and the last checkpoint is sound: lower model.optimizer.lr, set trainer.precision=32-true or skip such steps "
                "with model.skip_non_finite=3, then resume with ckpt_path=last"
            )


def set_mode(trainer: L.Trainer, mode: str) -> None:
    """Tell an optimizer with modes (schedulefree's) whether the weights are trained or used."""
    for optimizer in trainer.optimizers:
        if switch := getattr(optimizer, mode, None):
            switch()


def scheduled(make: Callable[..., Any], optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """Return `make(optimizer)`, with max_steps for its one other required parameter, whose name differs between libraries."""
    [_, *rest] = inspect.signature(make).parameters.values()
    needed = [p.name for p in rest if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(needed) > 1:
        raise UserError(f"model.lr_schedule needs {' and '.join(needed)}: give them, as +model.lr_schedule.{needed[0]}=...")
    return make(optimizer, **dict.fromkeys(needed, max_steps))


def match_parameter_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory format of their parameters, which fused updates need."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def log_train(module: L.LightningModule, loss: Tensor, logs: Mapping[str, Tensor], batch_size: int) -> None:
    """Log `train/loss` and `train/<name>`. The loss is averaged over the ranks, in logged steps only: it waits for all."""
    trainer: Any = module._trainer  # None for a step outside of a training
    if trainer is not None and trainer.world_size > 1 and (module.global_step + 1) % trainer.log_every_n_steps == 0:
        loss = trainer.strategy.reduce(loss.detach(), reduce_op="mean")
    module.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
    module.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=batch_size)


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)
