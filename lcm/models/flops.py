"""The FLOP of a network, counted, and the matmul throughput of a device, measured."""

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
    """Return the FLOP of matmuls, convolutions and attention of one call, counted on the meta device.

    A multiply-add is 2 FLOP. trained: add the backward pass. The gradients of inputs (including the first layer's) cost as much
    as the forward pass, and so do the gradients of weights. Frozen weights under adapters need no gradients.
    """
    forward = forward_flop(family, net, z_shape, cond)
    if not trained:
        return forward
    return 3 * forward - (forward_flop(family, net, z_shape, cond, adapters=False) if is_adapted(net) else 0)


def forward_flop(family: Family, net: Any, z_shape: torch.Size, cond: Condition, *, adapters: bool = True) -> int:
    """Return the FLOP of one forward call. adapters: whether to count a network's adapters."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy, t = original_class(net).from_config(net.config), torch.empty(z_shape[0], dtype=torch.int64)
        if adapters and is_adapted(net):
            copy.add_adapter(net.peft_config[NAME], NAME)
        as_network(family, copy)(torch.empty(z_shape), t, {name: part.to("meta") for name, part in cond.items()})
    return counter.get_total_flops()


def matmul_tflops(device: Any, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Return the best TFLOP/s of `repeats` square matmuls after a warm-up. Constants would be faster than normal numbers."""
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator(device, "matmul"))
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:]) / 1e12
