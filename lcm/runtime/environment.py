"""The circumstances of a result, except the configuration: the code's commit, the versions, the machine, and the command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from lcm.runtime.redaction import redacted

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "numpy")


def commit() -> str:
    """Return the commit of the working tree, with a + if it has changes, or the version of the installed package."""
    root = str(Path(__file__).parents[2])
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return f"unknown, version {version('latent-consistency')}"
    return head.stdout.strip() + "+" * bool(changes.stdout.strip())


def environment() -> dict[str, str]:
    """Return the commit, the versions, the system and the devices, by name."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.platform(),
        "device": ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)) or "CPU",
    }


def device_name(device: str) -> str:
    """Return the name of a torch device: the name of the GPU, or the CPU with its number of threads."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} ({torch.get_num_threads()} threads)"


def command_line(program: str) -> str:
    """Return this process's command for a shell, without secrets. program: such as `train.py` or `-m lcm.evaluate`."""
    return redacted(f"python {program} {shlex.join(sys.argv[1:])}".rstrip())
