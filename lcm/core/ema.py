"""Exponential moving averages of parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(average: Iterable[Tensor], online: Iterable[Tensor], decay: float) -> None:
    """`average <- decay * average + (1 - decay) * online` in place, one fused call for all tensors."""
    torch._foreach_lerp_(list(average), list(online), 1 - decay)


def warmed_up(decay: float, step: int) -> float:
    """`min(decay, (1 + step) / (10 + step))`: early on a shorter memory, so that the first weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))
