"""Networks sharded over processes by torch's FSDP2, and gathered again."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    network: Any, blocks: tuple[type[nn.Module], ...], mesh: DeviceMesh, compute: torch.dtype | None, *, compile: bool = False
) -> None:
    """Leave each process its part of every parameter. A block is gathered when it runs, in `compute` (None: as stored).

    mesh: 1-D, or (replicas, shards). Gradients are reduced in float32. compile: each block by itself, since gathering is no
    part of a graph.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in reversed(list(network.modules())):  # children first, the root last
        if compile and isinstance(module, blocks):
            module.compile()
        if isinstance(module, blocks) or module is network:
            # Freed after the forward pass also by the root: a target's has no backward pass to do it, and would go stale.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def whole(network: Any) -> Any:
    """Gather a sharded network on rank 0's CPU (collective; None elsewhere). Unsharded networks are returned unchanged."""
    if not is_sharded(network):
        return network
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    with torch.device("meta"):
        empty = original_class(network).from_config(network.config)
    empty.load_state_dict(state, assign=True)
    return empty.requires_grad_(False).eval()


def original_class(network: Any) -> Any:
    """Return a network's class; `fully_shard` puts a subclass of FSDPModule and of it in its place."""
    return next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
