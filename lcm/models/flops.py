"""Arithmetic: what a UNet takes, counted, and what the device can do, measured."""

import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lcm.core.condition import Condition, each
from lcm.core.random import generator
from lcm.models.lora import NAME, is_adapted
from lcm.models.student import as_network


def call_flop(unet: UNet2DConditionModel, z_shape: torch.Size, cond: Condition, trained: bool) -> int:
    """FLOP (2 a multiply-add) of matmuls, convolutions and attention of one call, counted on the meta device.

    trained: with its backward, which takes a forward's for the gradients of inputs (the very first layer's is not left aside)
    and another for those of weights, of which adapters leave the network's own out.
    """
    forward = forward_flop(unet, z_shape, cond)
    if not trained:
        return forward
    return 3 * forward - (forward_flop(unet, z_shape, cond, adapters=False) if is_adapted(unet) else 0)


def forward_flop(unet: UNet2DConditionModel, z_shape: torch.Size, cond: Condition, *, adapters: bool = True) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy, t = UNet2DConditionModel.from_config(unet.config), torch.empty(z_shape[0], dtype=torch.int64)
        if adapters and is_adapted(unet):
            copy.add_adapter(unet.peft_config[NAME], NAME)
        as_network(copy)(torch.empty(z_shape), t, each(lambda part: part.to("meta"), cond))
    return counter.get_total_flops()


def matmul_tflops(device: Any, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """The ceiling: TFLOP/s of square matmuls of normal numbers (constant ones are faster), the best of `repeats` after one."""
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator(device, "matmul"))  # none of a training's
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:]) / 1e12
