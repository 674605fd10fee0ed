"""Resolvers of the configuration, such as `${fast_dtype:<device>}`. Importing this module registers them."""

import os
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import OmegaConf


def bfloat16_is_fast(device: str, cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Decide by the hardware, so that a resumed run decides alike. device: a torch device or a Lightning accelerator.

    A step of `lcd_mini` in bfloat16 took 1/1.6 of float32's time on an AMD EPYC with AVX512_BF16. It took 1/0.7 on an Intel
    Xeon with the same instructions but without AMX. A CPU without either emulates bfloat16.
    """
    if device != "cpu":
        import torch  # only where a value is read: `--help` answers sooner

        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported(including_emulation=False)
    info = Path(cpuinfo)
    words = set(info.read_text().split()) if info.is_file() else set()
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def fast_dtype(device: str) -> str:
    return "bfloat16" if bfloat16_is_fast(device) else "float32"


def fast_precision(accelerator: str) -> str:
    """The `precision` of Lightning's Trainer."""
    return "bf16-mixed" if bfloat16_is_fast(accelerator) else "32-true"


def held_out(root: str, shards: Any) -> str | None:
    """Return the validation shards in `root` if `shards` are OpenMoji's, else None."""
    return get_method("lcm.data.openmoji.held_out")(root, shards)


for resolver in (fast_dtype, fast_precision, held_out):
    OmegaConf.register_new_resolver(resolver.__name__, resolver)
OmegaConf.register_new_resolver("home", os.path.expanduser)  # for paths that Hydra reads before the program starts
