"""What every LightningModule here shares: optimizer, clipping, the non-finite guard, checkpoints of trained tensors only."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lcm.core.errors import UserError
from lcm.core.numbers import Positive, Seed, Whole
from lcm.core.random import RankSlice

Optimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
LRSchedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]
Draws = TypeVar("Draws")  # a dataclass of tensors, a row a sample

FIRST_EDITION = {  # the methods' names in checkpoints of the first edition, which have the same tensors
    "LatentDiffusion": "Denoising",
    "LatentConsistencyFineTuning": "LatentConsistencyFinetuning",
    "LoRADistillation": "LatentConsistencyDistillation of adapters",
    "ConsistencyModelDistillation": "ConsistencyDistillation",
    "ConsistencyModelTraining": "ConsistencyTraining",
}
LOOK_EVERY = 10  # optimizer steps between two looks at a GPU's gradient norm: each is a wait for the device


class TrainedModule(L.LightningModule):
    """One optimizer over the registered parameters; frozen networks live outside the module tree (see `frozen`).

    optimizer: `params -> Optimizer`; lr_schedule: `(optimizer, max_steps) -> LRScheduler`, stepped every optimizer step.
    clip_norm: gradients are scaled to at most this total norm (by hand: Lightning refuses to clip for a fused optimizer); None
    leaves them as they are.
    skip_non_finite: so many updates in a row may have a loss or gradient that is not finite; they are left out and counted,
    one more stops the training. Data and learning rate go on with the step's number, as if the update had been made.

    A resumed training takes tensors and its place from the checkpoint. Every setting is the configuration's.
    """

    averages: Mapping[str, str] = MappingProxyType({})  # a network that averages `net` -> the option that switches it on

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
        self.left_out_on_device: Tensor | None = None  # 1 where the device alone knows it, else 0
        self.frozen: dict[str, nn.Module] = {}  # a plain dict: not in state_dict, DDP, EMA, nor the optimizer

    def configure_model(self) -> None:
        """Where a strategy that shards (`trainer=fsdp`) has its networks sharded; nothing for the others."""
        if self.device_mesh is not None:
            raise UserError(f"{type(self).__name__} cannot be sharded: train it with trainer=ddp")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
        optimizer.register_load_state_dict_pre_hook(self.keep_settings)
        optimizer.register_load_state_dict_post_hook(lay_out_as_parameters)
        schedule = scheduled(self.make_lr_schedule, optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained; a group's "lr_scale" multiplies the optimizer's learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def keep_settings(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's optimizer state with this run's settings in its groups.

        A group may also hold numbers that an optimizer computes (Prodigy's `d`). They are no constructor's arguments and stay.
        """
        saved, moments = state["param_groups"], state["state"]
        kept, needed = {name for moment in moments.values() for name in moment}, self.moments(optimizer)
        if kept and not (needed and needed <= kept):
            say(f"resume:  {type(optimizer).__name__} starts without moments: the checkpoint's are another optimizer's")
            saved, moments = [{"params": group["params"]} for group in saved], {}
        settings = {name for cls in type(optimizer).__mro__ for name in inspect.signature(cls).parameters}
        settings = (settings | {"initial_lr"}) - {"params"}
        groups = [
            {**then, **{name: value for name, value in group.items() if name in settings or name not in then}}
            for then, group in zip(saved, optimizer.param_groups, strict=True)
        ]
        return {"state": moments, "param_groups": groups}

    def moments(self, optimizer: torch.optim.Optimizer) -> set[str]:
        """Return the names of what the configured optimizer remembers of a parameter."""
        parameter = nn.Parameter(torch.zeros(1, device=optimizer.param_groups[0]["params"][0].device))
        parameter.grad = torch.zeros_like(parameter)
        probe = self.make_optimizer([{"params": [parameter]}])
        probe.step(lambda: 0.0)
        return set(probe.state[parameter])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Start an average that the checkpoint lacks from `net`, and leave out one that this run does not keep.

        Raises UserError where other tensors differ in name or shape.
        """
        own, state = self.state_dict(), dict(state_dict)
        for network, option in self.averages.items():
            here, there = ([name for name in names if name.startswith(f"{network}.")] for names in (own, state))
            if here and not there:
                say(f"resume:  the average of {option} starts from the trained network: the checkpoint has none")
                online = {name: f"net{name.removeprefix(network)}" for name in here}
                state |= {name: state[source] for name, source in online.items() if source in state}
            elif there and not here:
                say(f"resume:  the checkpoint's average of {option} is left out: this run keeps none")
                for name in there:
                    del state[name]
        if strict and (names := misfits(own, state)):
            raise UserError(
                f"the checkpoint does not fit this training's network, {len(names)} of its tensors differ: {names[0]}; give "
                "the model as then (model.pipeline, model.adapters.rank, ...), or a name= of its own"
            )
        return super().load_state_dict(state, strict, assign)

    def settled(self) -> dict[str, Any]:
        """Return the settings that a training cannot change once it has begun, by option."""
        return {}

    @property
    def method(self) -> str:
        """Return the name under which checkpoints are told apart."""
        return type(self).__name__

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["method"], checkpoint["settled"] = self.method, self.settled()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for another method's, whose weights may even fit."""
        own, found = self.method, checkpoint.get("method", self.method)
        if FIRST_EDITION.get(found, found) != own:
            raise UserError(
                f"the checkpoint is of {found}, this training is a {own}: give it a name= of its own, or another ckpt_path"
            )
        for option, value in self.settled().items():
            then = checkpoint.get("settled", {}).get(option, value)
            if value != then:
                raise UserError(f"{option} was {then} when this training began and cannot change to {value}: leave it as then")
        checkpoint["lr_schedulers"] = []  # `on_train_start` brings the schedule to the checkpoint's step
        states = checkpoint.get("callbacks", {})
        for callback in self.trainer.callbacks if states else ():  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                states[callback.state_key]["patience"] = callback.patience  # Lightning would take the checkpoint's

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
        schedule: Any = self.lr_schedulers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps, which were made before the checkpoint
            for _ in range(self.global_step):
                schedule.step()
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
        """This rank's rows of `draw(z0 of all ranks, generator, **options)`; see `RankSlice`."""
        parts = []
        for size, rng, rows in self.rows(batch_idx, stage).blocks(len(z0)):
            drawn = draw(z0[:1].expand(size, *z0.shape[1:]), rng, **options)
            parts.append({name: values[rows] for name, values in vars(drawn).items()})
        return type(drawn)(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @property
    def world_size(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def rows(self, batch_idx: int, stage: str = "train") -> RankSlice:
        keys = (self.seed, stage, batch_idx)
        return RankSlice(self.device, *keys, rank=self.global_rank, world_size=self.world_size)

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
            inner.found_inf = self.left_out_on_device = (self.in_a_row > 0).float()
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
        """Once per optimizer step, also under gradient accumulation: moving averages move, unless `left_out_on_device`."""


@rank_zero_only
def say(line: str) -> None:
    print(line, flush=True)


def misfits(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return how the tensors of a checkpoint differ from a module's in shape and name."""
    both = [(name, list(state[name].shape), list(own[name].shape)) for name in own if name in state]
    return [
        *(f"{name} was {then} and is {now}" for name, then, now in both if then != now),
        *(f"{name} is not in the checkpoint" for name in own if name not in state),
        *(f"{name} is in the checkpoint alone" for name in state if name not in own),
    ]


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
