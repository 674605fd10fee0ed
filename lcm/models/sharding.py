"""UNets sharded over processes by torch's FSDP2, and whole again."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

UNITS = (BasicTransformerBlock, ResnetBlock2D, Downsample2D, Upsample2D)  # gathered one at a time; what is left, with the root


def shard(unet: UNet2DConditionModel, mesh: DeviceMesh, compute: torch.dtype | None, *, compile: bool = False) -> None:
    """Leave each process its part of every parameter; a block is gathered when it runs, in `compute` (None: as stored).

    mesh: 1-D, or (replicas, shards). Gradients are reduced in float32. compile: each block by itself, since gathering is no
    part of a graph.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in reversed(list(unet.modules())):  # children first, the root last
        if compile and isinstance(module, UNITS):
            module.compile()
        if isinstance(module, UNITS) or module is unet:
            # Freed after the forward pass also by the root: a target's has no backward pass to do it, and would go stale.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def whole(unet: UNet2DConditionModel) -> UNet2DConditionModel | None:
    """A sharded UNet in one piece on the CPU of process 0, and None on the others, which all take part; any other as it is."""
    if not is_sharded(unet):
        return unet
    state = get_model_state_dict(unet, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(unet.config)
    empty.load_state_dict(state, assign=True)
    return empty.requires_grad_(False).eval()
