"""Which of torch's kernels a training runs on."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lcm.core.errors import UserError

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


def check_compiler(option: str) -> None:
    """Raise UserError where torch.compile lacks a compiler: Triton needs C and Python's headers, a CPU's code C++."""
    on_gpu = torch.cuda.is_available()
    gnu, clang, variable, language = ("gcc", "clang", "CC", "C") if on_gpu else ("g++", "clang++", "CXX", "C++")
    known = [os.environ[variable].split()[0]] if os.environ.get(variable, "").split() else [gnu, clang]
    if sys.platform == "win32":
        known = [*known, "cl"]
    if not any(map(shutil.which, known)):
        raise UserError(f"{option}=true needs a {language} compiler, and there is none: install {gnu} or set {option}=false")
    if on_gpu and not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        raise UserError(f"{option}=true needs Python's headers (Python.h): install python3-dev or set {option}=false")


def allow_graphs(number: int) -> None:
    """Let torch.compile keep so many graphs of one function; it would run further ones uncompiled, with a warning."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, number)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, number)
