"""Sharding of networks by torch's FSDP2, and gathering."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    network: Any, blocks: tuple[type[nn.Module], ...], mesh: DeviceMesh, compute: torch.dtype | None, *, compile: bool = False
) -> None:
    """Shard every parameter over the ranks of `mesh`, in place. Each of the `blocks` is gathered while it runs.

    mesh: 1-D, or (replicas, shards). compute: the dtype of gathered parameters; None keeps it. Gradients are reduced in
    float32. compile: compile each block separately, as a graph cannot contain the gathering.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in reversed(list(network.modules())):  # children first, the root last
        if compile and isinstance(module, blocks):
            module.compile()
        if isinstance(module, blocks) or module is network:
            # The root is resharded as well: a target network has no backward pass, and its gathered weights would go stale.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    """Return whether `shard` was applied to the network."""
    return isinstance(network, FSDPModule)


def gather(network: Any) -> Any:
    """Return a sharded network, gathered on the CPU of rank 0, and None on other ranks (collective).

    A network that is not sharded is returned unchanged.
    """
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
    """Return the class of a network as it was before `fully_shard`, which replaces a class by a subclass."""
    return next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
