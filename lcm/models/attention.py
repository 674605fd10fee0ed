"""Attention kernels, activation checkpointing and torch.compile."""

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
    """Return a context that prefers cuDNN's attention on Hopper GPUs and newer.

    On an H100 cuDNN takes 0.57 of flash attention's time at Stable Diffusion 1.5's head dimension of 40, forward and backward
    (docs/performance.md). Each new shape costs one or two seconds, so use the context for training, not for sampling.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return sdpa_kernel(BY_SPEED, set_priority=True) if hopper else nullcontext()


def recompute_in_backward(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` without saving its activations, in the form that `enable_gradient_checkpointing` expects.

    The call must run under `fast_attention`. The backward pass recomputes the activations with the same kernels, because other
    kernels save other tensors.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), fast_attention(device)))


def check_compiler(option: str) -> None:
    """Raise UserError if torch.compile lacks a compiler. option: the configuration key, for the message.

    Triton needs a C compiler and Python's headers. The CPU backend needs a C++ compiler.
    """
    on_gpu = torch.cuda.is_available()
    gnu, clang, variable, language = ("gcc", "clang", "CC", "C") if on_gpu else ("g++", "clang++", "CXX", "C++")
    compilers = [os.environ[variable].split()[0]] if os.environ.get(variable, "").split() else [gnu, clang]
    if sys.platform == "win32":
        compilers = [*compilers, "cl"]
    if not any(map(shutil.which, compilers)):
        raise UserError(f"{option}=true needs a {language} compiler, and there is none: install {gnu} or set {option}=false")
    if on_gpu and not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        raise UserError(f"{option}=true needs Python's headers (Python.h): install python3-dev or set {option}=false")


def allow_graphs(number: int) -> None:
    """Let torch.compile keep this many graphs per function. A call that needs one more runs uncompiled, with a warning."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, number)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, number)
