"""Resolvers of the configuration, such as `${fast_dtype:<device>}`. Importing this module registers them."""

import os
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import OmegaConf


def bfloat16_is_fast(device: str, cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Return whether bfloat16 is faster than float32. device: a torch device or a Lightning accelerator.

    The result depends on the hardware only, so that a resumed run has the same dtype. A step of `lcd_mini` in bfloat16 took
    1/1.6 of float32's time on an AMD EPYC with AVX512_BF16. On an Intel Xeon with AVX512_BF16 and without AMX it took 1/0.7. A
    CPU without AMX and AVX512_BF16 emulates bfloat16.
    """
    if device != "cpu":
        import torch  # only if a value is read, so that `--help` answers at once

        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path(cpuinfo)
    words = set(info.read_text().split()) if info.is_file() else set()
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def fast_dtype(device: str) -> str:
    """Return the faster dtype of networks on the device."""
    return "bfloat16" if bfloat16_is_fast(device) else "float32"


def fast_precision(accelerator: str) -> str:
    """Return the faster `precision` of Lightning's Trainer."""
    return "bf16-mixed" if bfloat16_is_fast(accelerator) else "32-true"


def held_out(root: str, shards: Any) -> str | None:
    """Return the validation shards in `root` if `shards` are OpenMoji's, else None."""
    return get_method("lcm.data.openmoji.held_out")(root, shards)


for resolver in (fast_dtype, fast_precision, held_out):
    OmegaConf.register_new_resolver(resolver.__name__, resolver)
OmegaConf.register_new_resolver("home", os.path.expanduser)  # for paths that Hydra reads before the program starts
