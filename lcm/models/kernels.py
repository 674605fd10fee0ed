"""Which of torch's kernels a training runs on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

BY_SPEED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """cuDNN's attention where it has one for the shape, else torch's own choice.

    On an H100 it takes 0.57 of flash attention's time at Stable Diffusion 1.5's head dimension of 40, forward and backward
    (docs/performance.md). A second or two go into each new shape, which a training has few of and sampling many.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return sdpa_kernel(BY_SPEED, set_priority=True) if hopper else nullcontext()


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing as `enable_gradient_checkpointing` takes it, of a call under `fast_attention`: the backward
    recomputes with the same kernels, since others keep other tensors."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), fast_attention(device)))
