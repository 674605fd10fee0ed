"""Learning-rate schedules against their closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lcm.modules.lr_schedules import constant, cosine


def rates(schedule: Callable[..., Any], steps: int, max_steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, max_steps, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_constant_warms_up_linearly() -> None:
    assert rates(constant, 6, 6, warmup=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_is_half_a_period() -> None:
    assert rates(cosine, 9, 8) == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(9)])


def test_cosine_falls_after_the_warmup() -> None:
    decay = [1 + math.cos(math.pi * step / 6) for step in range(7)]
    assert rates(cosine, 9, 8, warmup=2) == pytest.approx([2 / 3, 4 / 3, *decay])


def test_cosine_ends_at_its_final_share_and_stays() -> None:
    assert rates(cosine, 12, 8, final=0.1)[8:] == pytest.approx([0.2] * 4)


@pytest.mark.filterwarnings("ignore:::lightning")
def test_lr_moves_once_per_optimizer_step(training: Any, data: Any, fit: Any) -> None:
    module = training("diffusion", lr_schedule=lambda optimizer, max_steps: cosine(optimizer, max_steps, warmup=1), lr=1e-3)
    trainer = fit(module, data(), 4, accumulate_grad_batches=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)
    assert trainer.fit_loop.epoch_loop.global_step == 4
