"""Optimizers and schedules of other libraries."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from lcm.core.errors import UserError
from lcm.modules.lr_schedules import constant
from lcm.modules.optimization import Optimization, new_schedule


class WithModes(torch.optim.SGD):
    """An optimizer with a train mode and an eval mode, like the optimizers of schedulefree."""

    mode = "none"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_optimizer_modes_follow_the_training(monkeypatch: Any) -> None:
    optimization, module = Optimization(WithModes, constant, None, 0), L.LightningModule()
    optimizers = [WithModes([torch.nn.Parameter(torch.zeros(1))]), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])]
    trainer = SimpleNamespace(optimizers=optimizers, global_step=0)
    monkeypatch.setattr(module, "lr_schedulers", lambda: None)  # no update was made yet
    monkeypatch.setattr(module, "all_gather", lambda value: value[None])
    modes = []
    for hook in ("on_train_start", "on_validation_start", "on_validation_end", "on_train_end"):
        getattr(optimization, hook)(trainer, module)
        modes.append(optimizers[0].mode)
    assert modes == ["train", "eval", "train", "eval"]


@pytest.mark.parametrize(
    "make",
    [
        partial(get_cosine_schedule_with_warmup, num_warmup_steps=0),
        partial(get_cosine_schedule_with_warmup, num_warmup_steps=0, num_training_steps=10),
        torch.optim.lr_scheduler.CosineAnnealingLR,
        partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.0),
    ],
    ids=["steps_missing", "steps_given", "class", "no_steps_needed"],
)
def test_schedules_of_other_libraries_get_max_steps(make: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = new_schedule(make, optimizer, 10)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_schedule_with_more_arguments_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match="num_warmup_steps and num_training_steps"):
        new_schedule(get_cosine_schedule_with_warmup, optimizer, 10)
