"""Exponential moving averages of parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def ema_update_(average: Iterable[Tensor], online: Iterable[Tensor], decay: float, skip: Tensor | None = None) -> None:
    """Update `average <- decay * average + (1 - decay) * online` in place, with one fused call for all tensors.

    Tensors shared by both are skipped. skip: None, or a float32 scalar on the tensors' device. A value of 1 leaves the
    averages unchanged without waiting for the device.
    """
    pairs = [(a, b) for a, b in zip(local_shards(average), local_shards(online), strict=True) if a is not b]
    if not pairs:
        return
    averages, targets = zip(*pairs, strict=True)
    if skip is None:
        torch._foreach_lerp_(averages, targets, 1 - decay)
        return
    # _foreach_lerp_ with a scalar tensor as weight is not fused. A step of fused SGD with weight decay 1 and the gradient
    # `online` (maximised) is the same lerp, and its `found_inf` skips the step on the device.
    step: Any = {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
    torch._fused_sgd_(averages, targets, [], lr=1 - decay, maximize=True, found_inf=skip, **step)


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each sharded tensor. Other tensors are returned unchanged."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def warmed_up(decay: float, step: int) -> float:
    """Return `min(decay, (1 + step) / (10 + step))`, which forgets the initial weights sooner."""
    return min(decay, (1 + step) / (10 + step))
