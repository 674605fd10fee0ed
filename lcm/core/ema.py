"""Exponential moving averages of parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def ema_update_(average: Iterable[Tensor], online: Iterable[Tensor], decay: float, gate: Tensor | None = None) -> None:
    """`average <- decay * average + (1 - decay) * online` in place, one fused call for all tensors.

    A tensor that both have in common is its own average and is left alone.
    gate: a scalar on their device; where it is 0 the average stays as it is, and the host need not know.
    """
    pairs = [(a, b) for a, b in zip(own_shards(average), own_shards(online), strict=True) if a is not b]
    if not pairs:
        return
    averages, moved = zip(*pairs, strict=True)
    weight = 1 - decay
    weights: Any = weight if gate is None else [(weight * gate).to(averages[0].dtype)] * len(averages)
    torch._foreach_lerp_(averages, moved, weights)


def own_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of sharded tensors what this process holds: elementwise work needs no more."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def warmed_up(decay: float, step: int) -> float:
    """`min(decay, (1 + step) / (10 + step))`: early on a shorter memory, so that the first weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))
