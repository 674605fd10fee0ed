"""Features of a frozen network's blocks, in which an adversary judges latents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcm.models.families import Family
from lcm.models.sharding import is_sharded


def block_features(family: Family, net: Any, call: Callable[[], Tensor]) -> list[Tensor]:
    """Return the features `[B, C, N]` float32 of the family's `feature_blocks` while `call()` calls the network once.

    Gradients flow through them to the network's input.
    """
    found: list[Tensor] = []
    blocks = [block for block, _ in family.feature_blocks(net)]
    hooks = [block.register_forward_hook(lambda *given: found.append(family.feature(given[-1]).float())) for block in blocks]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    if is_sharded(net) and torch.is_grad_enabled():
        # The root's own weights are gathered again before a backward pass of its output. The features are not its output.
        net.unshard()
    return found
