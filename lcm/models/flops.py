"""Arithmetic: the FLOP of a network, counted, and the rate of the device, measured."""

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lcm.core.denoiser import Condition
from lcm.core.random import generator
from lcm.models.families import Family
from lcm.models.lora import NAME, is_adapted
from lcm.models.sharding import original_class
from lcm.models.student import as_network


def call_flop(family: Family, net: Any, z_shape: torch.Size, cond: Condition, trained: bool) -> int:
    """Return the FLOP (2 a multiply-add) of matmuls, convolutions and attention of one call, counted on the meta device.

    trained: with its backward, which costs a forward for the gradients of inputs (the first layer included) and another for
    those of weights. Adapters leave out the gradients of the network's own weights.
    """
    forward = forward_flop(family, net, z_shape, cond)
    if not trained:
        return forward
    return 3 * forward - (forward_flop(family, net, z_shape, cond, adapters=False) if is_adapted(net) else 0)


def forward_flop(family: Family, net: Any, z_shape: torch.Size, cond: Condition, *, adapters: bool = True) -> int:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy, t = original_class(net).from_config(net.config), torch.empty(z_shape[0], dtype=torch.int64)
        if adapters and is_adapted(net):
            copy.add_adapter(net.peft_config[NAME], NAME)
        as_network(family, copy)(torch.empty(z_shape), t, {name: part.to("meta") for name, part in cond.items()})
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
