"""What programs are given besides a model: prompts, shards, a folder for what they write, a device."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from lcm.command_line import build
from lcm.composition import plain
from lcm.data.shards import expand_urls
from lcm.data.source import Source
from lcm.errors import UserError


def read_prompts(prompts: str | list[str], captions: Callable[[], list[str]]) -> list[str]:
    """A prompt, a list of them, a .txt file with one a line, or `val`: the validation captions."""
    if prompts == "val":
        return captions()
    if isinstance(prompts, str) and prompts.endswith(".txt"):
        file = Path(prompts)
        try:
            prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"there is no prompt file {prompts}") from None
        except (OSError, UnicodeError) as error:
            raise UserError(f"the prompt file {file} cannot be read ({error}): write one prompt a line, in UTF-8") from error
        if not prompts:
            raise UserError(f"{file} has no prompts: write one a line")
    if not prompts:
        raise UserError(f"prompts={prompts} has none: give one, a list, or a .txt file; prompts=[''] draws without a text")
    return [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]


def output_folder(path: str, option: str = "output") -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # another process of the same program may have been first
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): set {option} to a writable folder") from None
    return folder


def pick_device(device: str, local_rank: int = 0) -> str:
    """`auto` is the GPU if there is one; of several processes on a machine each has its own as `cuda`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU: use device=cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device} is none: use auto, cuda, cuda:1, cpu or mps") from None
    if device == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return device


def shards(cfg: DictConfig, option: str) -> Source:
    """The shards that an option of a program names, brought here through its cache."""
    return Source(expand_urls(cfg[option], option), captions=plain(cfg.captions), cache=build(cfg.cache))
