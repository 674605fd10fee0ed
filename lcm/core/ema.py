"""Exponential moving averages of parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def ema_update_(average: Iterable[Tensor], online: Iterable[Tensor], decay: float, skip: Tensor | None = None) -> None:
    """`average <- decay * average + (1 - decay) * online` in place, one fused call for all tensors.

    A tensor that both have in common is its own average and is left alone.
    skip: a float32 scalar on their device. Where it is 1 the average stays as it is, and the host need not know.
    """
    pairs = [(a, b) for a, b in zip(own_shards(average), own_shards(online), strict=True) if a is not b]
    if not pairs:
        return
    averages, moved = zip(*pairs, strict=True)
    if skip is None:
        torch._foreach_lerp_(averages, moved, 1 - decay)
        return
    # A lerp whose weight is a tensor runs tensor by tensor: foreach's fused path wants a weight of each tensor's size. A step
    # of SGD from `average` with the gradient `average - online` (a decay of 1) is the same lerp, and `found_inf` skips it.
    step: Any = {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
    torch._fused_sgd_(averages, moved, [], lr=1 - decay, maximize=True, found_inf=skip, **step)


def own_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of sharded tensors what this process holds: elementwise work needs no more."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def warmed_up(decay: float, step: int) -> float:
    """`min(decay, (1 + step) / (10 + step))`: early on a shorter memory, so that the first weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))
