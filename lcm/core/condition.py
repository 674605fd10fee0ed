"""What a network is told beside z_t, t and w: text states, or for Stable Diffusion XL more."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SizedText(NamedTuple):
    """Stable Diffusion XL's condition (2307.01952, section 2.2).

    states: `[B, L, D]`; pooled: `[B, P]`, a caption as one vector; sizes: `[B, 6]` int64, in pixels the original (height,
    width), the crop's (top, left) and the (height, width) of the image itself.
    """

    states: Tensor
    pooled: Tensor
    sizes: Tensor


Condition = Tensor | SizedText  # a tensor: text states [B, L, D]


def each(change: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """`change` of the conditions' tensors, part by part."""
    if isinstance(conditions[0], Tensor):
        return change(*conditions)
    return SizedText(*map(change, *conditions))


def doubled(cond: Condition, uncond: Condition) -> Condition:
    """`[2B]`: cond's rows `[B]`, then uncond's `[1]` or `[B]` for each of them."""
    return each(lambda c, u: torch.cat([c, u.expand_as(c)]), cond, uncond)
