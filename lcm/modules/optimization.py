"""The optimizers of a training: schedules, gradient clipping and the guard against non-finite losses."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lcm.core.errors import UserError
from lcm.runtime.launch import say

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]

CHECK_EVERY = 10  # optimizer steps between two checks of a GPU's gradient norm; a check waits for the device


class Opponent(nn.Module):
    """A network that is trained in the steps of a LightningModule by a second optimizer: a discriminator or a fake score.

    The LightningModule holds the opponent as a child and gives it to its `Optimization`. Lightning sees the module's optimizer
    only, so it counts each step once. Parameters that require gradients at the construction of the opponent are trained. They
    require gradients within `learn` only, so DDP, the module's optimizer and its clipping skip them. The module's gradient
    still passes through the opponent.
    """

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def __init__(self, network: nn.Module, optimizer: OptimizerFactory, lr_schedule: ScheduleFactory) -> None:
        super().__init__()
        self.network = network
        self.names = {name for name, p in self.named_parameters() if p.requires_grad}
        self.trained: list[nn.Parameter] = []
        self.requires_grad_(False)
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule

    def configure(self, max_steps: int) -> None:
        """Make the optimizer and its schedule."""
        self.trained = [p for name, p in self.named_parameters() if name in self.names]  # by name: sharding replaces parameters
        groups = [{"params": self.trained}]
        self.optimizer, self.schedule = new_optimizer(self.make_optimizer, self.make_lr_schedule, groups, max_steps)

    def learn(self, loss: Callable[[], Tensor], share: float = 1.0) -> Tensor:
        """Add the gradient of `share * loss()`, and return the loss. `step` makes the update, with the module's update."""
        for p in self.trained:
            p.requires_grad_(True)
        value = loss()
        (share * value).backward()
        for p in self.trained:
            p.requires_grad_(False)
        return value.detach()

    def clip(self, trainer: L.Trainer, clip_norm: float) -> Tensor:
        """Average the gradients over the ranks, clip them, and return their norm."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        sharded = any(isinstance(gradient, DTensor) for gradient in gradients)  # FSDP has averaged them
        if trainer.world_size > 1 and gradients and not sharded:
            flat: Any = trainer.strategy.reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        return total_norm(self.parameters(), clip_norm)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()


class Optimization(L.Callback):
    """The optimizer of a LightningModule, which returns this callback from `configure_callbacks`.

    optimizer: `params -> Optimizer`. lr_schedule: `(optimizer, max_steps) -> LRScheduler`, stepped every optimizer step.
    clip_norm: limit of the total gradient norm; None: no clipping. Lightning refuses to clip for a fused optimizer.
    skip_non_finite: number of consecutive updates that may be skipped for a non-finite loss or gradient. One more stops the
    training. In a skipped step the step number, the data and the learning rate advance as usual.
    opponents: are clipped, updated, saved and resumed with the module. A non-finite gradient of the module or of an opponent
    skips all updates. A checkpoint holds the states of the opponents' optimizers after the module's, in "optimizer_states".

    A resumed training takes tensors and step number from the checkpoint, and every setting from the configuration.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        clip_norm: float | None,
        skip_non_finite: int,
        opponents: Sequence[Opponent] = (),
    ) -> None:
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.clip_norm = float("inf") if clip_norm is None else clip_norm
        self.skip_non_finite, self.opponents = skip_non_finite, list(opponents)
        self.opponent_states: list[dict[str, Any]] = []  # the checkpoint's states, until the optimizers are made
        self.skipped_update = False  # whether the host skipped the last update
        self.skipped_on_device: Tensor | None = None  # 1.0 if the device skipped the last update, else 0.0; None on the host

    def configure(self, groups: list[dict[str, Any]], max_steps: int) -> dict[str, Any]:
        """Return the result of `configure_optimizers`. A group's "lr_scale" multiplies the optimizer's learning rate."""
        optimizer, schedule = new_optimizer(self.make_optimizer, self.make_lr_schedule, groups, max_steps)
        for opponent in self.opponents:
            opponent.configure(max_steps)
        for opponent, state in zip(self.opponents, self.opponent_states, strict=False):
            opponent.optimizer.load_state_dict(state)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # resume

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] += [opponent.optimizer.state_dict() for opponent in self.opponents]

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.opponent_states = checkpoint.get("optimizer_states", [])[1:]  # a sharded strategy has loaded them already
        checkpoint["lr_schedulers"] = []  # `on_train_start` moves the schedule to the checkpoint's step
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                states[callback.state_key]["patience"] = callback.patience  # Lightning would restore the old patience

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps = module.all_gather(torch.tensor(trainer.global_step, device=module.device))
        assert isinstance(steps, Tensor)
        if steps.min() != steps.max():
            raise UserError(
                f"the ranks start at different steps, {sorted(set(steps.tolist()))}: set paths.runs to a folder that all ranks "
                "see"
            )
        schedules: list[Any] = [module.lr_schedulers(), *(opponent.schedule for opponent in self.opponents)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it has not seen the optimizer steps before the checkpoint
            for schedule in schedules:
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
        self.skipped = self.skipped_in_a_row = torch.zeros((), device=module.device)  # all skips; consecutive skips

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        """Clip the gradients, and skip a non-finite update.

        Fused optimizers skip on the device, and the host checks the number of skips every `CHECK_EVERY` steps. After too many
        consecutive skips, the device skips every update until this check. Gradients are averaged over the ranks, so all ranks
        decide alike.
        """
        trained = [p for p in module.parameters() if p.requires_grad]
        norm = total_norm(trained, self.clip_norm).to(module.device)
        module.log("train/grad_norm", norm)
        not_finite, optimizers = ~norm.isfinite(), [getattr(optimizer, "optimizer", optimizer)]
        for opponent in self.opponents:
            not_finite = not_finite | ~opponent.clip(trainer, self.clip_norm).isfinite()
            optimizers.append(opponent.optimizer)
        self.skipped_in_a_row = (self.skipped_in_a_row + not_finite) * (
            not_finite | (self.skipped_in_a_row > self.skip_non_finite)
        )
        self.skipped = self.skipped + not_finite
        if self.skip_non_finite:
            module.log("train/skipped_steps", self.skipped)

        step = trainer.global_step + 1
        on_device = all(self.skips_on_device(optimizer, module.device) for optimizer in optimizers)
        if not on_device or step % CHECK_EVERY == 0 or step == trainer.max_steps:
            self.check_skipped(trainer)
        self.skipped_update = not on_device and bool(not_finite)
        if on_device:
            self.skipped_on_device = (self.skipped_in_a_row > 0).float()
        for optimizer in optimizers:
            if on_device:
                optimizer.found_inf = self.skipped_on_device
            elif self.skipped_update:
                optimizer.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        for opponent in self.opponents:
            opponent.step()

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


def total_norm(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
    """Clip the gradients by their total norm over all shards, and return the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def new_optimizer(
    make_optimizer: OptimizerFactory, make_lr_schedule: ScheduleFactory, groups: list[dict[str, Any]], max_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return an optimizer that can load a checkpoint's state, and its schedule."""
    optimizer = make_optimizer(groups)
    if type(optimizer).__module__.startswith("bitsandbytes") and isinstance(optimizer.param_groups[0]["params"][0], DTensor):
        raise UserError("bitsandbytes' optimizers cannot update shards: set model/optimizer=adamw, or trainer=ddp")
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)
    load = optimizer.load_state_dict

    def load_with_settings(state: dict[str, Any]) -> None:  # not by hooks: bitsandbytes' own `load_state_dict` runs none
        load(keep_settings(make_optimizer, optimizer, state))
        match_parameter_layout(optimizer)

    optimizer.load_state_dict = load_with_settings  # type: ignore[method-assign, assignment]
    return optimizer, new_schedule(make_lr_schedule, optimizer, max_steps)


def keep_settings(make_optimizer: OptimizerFactory, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's optimizer state with the settings of this run in its groups.

    A group may also hold numbers that an optimizer computes (Prodigy's `d`). The checkpoint's values of these numbers are used:
    they are no constructor arguments.
    """
    saved_groups, moments = state["param_groups"], state["state"]
    saved, needed = names_in(moments.values()), moments_of(make_optimizer, optimizer)
    if saved and not (needed and needed <= saved):
        say(f"resume:  {type(optimizer).__name__} starts without moments: the checkpoint's are another optimizer's")
        saved_groups, moments = [{"params": group["params"]} for group in saved_groups], {}
    settings = {name for cls in type(optimizer).__mro__ for name in inspect.signature(cls).parameters}
    settings = (settings | {"initial_lr"}) - {"params"}
    groups = [
        {**saved_group, **{name: value for name, value in group.items() if name in settings or name not in saved_group}}
        for saved_group, group in zip(saved_groups, optimizer.param_groups, strict=True)
    ]
    return {"state": moments, "param_groups": groups}


def names_in(moments: Iterable[dict[str, Any]]) -> set[str]:
    """Return the names of saved moments. bitsandbytes nests its 8-bit moments."""
    nested = [value for moment in moments for value in moment.values() if isinstance(value, dict)]
    return {name for moment in (*moments, *nested) for name in moment}


def moments_of(make_optimizer: OptimizerFactory, optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of the moments that the configured optimizer keeps for each parameter."""
    parameter = nn.Parameter(torch.zeros(1, device=optimizer.param_groups[0]["params"][0].device))
    parameter.grad = torch.zeros_like(parameter)
    probe = make_optimizer([{"params": [parameter]}])
    probe.step(lambda: 0.0)
    return set(probe.state[parameter])


def set_mode(trainer: L.Trainer, mode: str) -> None:
    """Call `optimizer.train()` or `optimizer.eval()` if the optimizer has these modes (schedulefree). mode: its name."""
    for optimizer in trainer.optimizers:
        if switch := getattr(optimizer, mode, None):
            switch()


def new_schedule(make: Callable[..., Any], optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """Return `make(optimizer)`. A second required parameter gets max_steps: its name differs between libraries."""
    [_, *rest] = inspect.signature(make).parameters.values()
    needed = [p.name for p in rest if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(needed) > 1:
        raise UserError(f"model.lr_schedule needs {' and '.join(needed)}: give them, as +model.lr_schedule.{needed[0]}=...")
    return make(optimizer, **dict.fromkeys(needed, max_steps))


def match_parameter_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory format of their parameters, which fused updates need."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_moment = isinstance(value, Tensor) and value.is_floating_point()  # 8-bit moments are stored by blocks
            if is_moment and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def log_train(module: L.LightningModule, loss: Tensor, logs: Mapping[str, Tensor], batch_size: int) -> None:
    """Log `train/loss` and `train/<name>`. In logged steps the loss is averaged over the ranks, which waits for all ranks."""
    trainer: Any = module._trainer  # None for a step outside of a training
    if trainer is not None and trainer.world_size > 1 and (module.global_step + 1) % trainer.log_every_n_steps == 0:
        loss = trainer.strategy.reduce(loss.detach(), reduce_op="mean")
    module.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
    module.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=batch_size)
