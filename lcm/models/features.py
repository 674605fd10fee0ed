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
    features: list[Tensor] = []

    def record(block: Any, inputs: Any, output: Any) -> None:
        features.append(family.feature(output).float())

    hooks = [block.register_forward_hook(record) for block, _ in family.feature_blocks(net)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    if is_sharded(net) and torch.is_grad_enabled():
        # FSDP gathers the root's weights before a backward pass of the root's output. The features are not this output.
        net.unshard()
    return features
