"""Checkpoints in a folder, to which every process writes its own shards; nothing in it is a pickle that could run code.

    shard-<n>-model-00001-of-00001.safetensors   the tensors that process n holds, with their place in the whole
    rest.ckpt                                    everything else, loaded with weights_only=True
    files.json                                   the size and CRC-32 of each file above

torch.distributed.checkpoint writes and reads the shards, in safetensors in place of its own format, which loads with pickle.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_with_path

from lcm.runtime.atomic_io import remove, sync_names, whole_file
from lcm.runtime.integrity import LAST, LISTING, PREVIOUS, size_and_crc

KEYS = ("state_dict", "optimizer_states")
SHARDED = "in the shards"  # stands in rest.ckpt where a tensor was
Tree = dict[str, Any]
Change = Callable[[str, Any], Any]


def mapped(checkpoint: Tree, change: Change) -> Tree:
    """A copy of a checkpoint with `change(name, value)` in place of each value under `KEYS`.

    Names are as `state_dict/net.conv_in.weight` and `optimizer_states/0/state/5/exp_avg`.
    """

    def named(path: tuple[Any, ...], value: Any) -> Any:
        return change("/".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path), value)

    return {**checkpoint, **tree_map_with_path(named, {key: checkpoint[key] for key in KEYS if key in checkpoint})}


def write(checkpoint: Tree, target: Path) -> None:
    """Write a checkpoint of DTensors; called by every process.

    The folder is whole or absent: a kill at any moment leaves what was there before.
    """
    partial, shards = target.with_name(target.name + ".partial"), {}

    def take_out(name: str, value: Any) -> Any:
        if isinstance(value, DTensor):
            shards[name] = value.detach()
            return SHARDED
        return value

    rest = mapped(checkpoint, take_out)
    if dist.get_rank() == 0:
        remove(partial)
        partial.mkdir(parents=True)
        with whole_file(partial / "rest.ckpt") as file:
            torch.save(rest, file)
    dist.barrier()
    dcp.save(shards, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    mine = sorted(file.name for file in partial.iterdir())[dist.get_rank() :: dist.get_world_size()]
    found: list[Tree] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, {name: size_and_crc(partial / name) for name in mine})
    if dist.get_rank() == 0:
        with whole_file(partial / LISTING) as file:
            file.write(json.dumps({name: facts for part in found for name, facts in part.items()}, indent=2).encode())
        with replacing(target):
            partial.rename(target)
    dist.barrier()


@contextmanager
def replacing(target: Path) -> Iterator[None]:
    """Clears the place of a checkpoint, a file or a folder, for one that is renamed into it, and forgets the one before last.

    What is there becomes previous.ckpt if it is last.ckpt. A kill at any moment leaves a whole `*.ckpt`.
    """
    old = target.with_suffix(".old.ckpt")
    keep = target.with_name(PREVIOUS) if target.name == LAST else old
    remove(old)
    if target.exists():
        if keep.exists():
            keep.rename(old)
        target.rename(keep)
    yield
    sync_names(target.parent)
    remove(old)


def read(folder: Path, into: Callable[[str], Tensor | None] | None = None) -> Tree:
    """A checkpoint as it was written.

    into: the DTensor to read a named tensor into, for a call by every process; without it, this process alone reads
    everything, each tensor in one piece on the CPU.
    """
    rest = torch.load(folder / "rest.ckpt", map_location="cpu", weights_only=True)
    reader = HuggingFaceStorageReader(str(folder))
    facts = reader.read_metadata().state_dict_metadata
    shards: dict[str, Tensor] = {}

    def wanted(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value != SHARDED:
            return value
        own = into(name) if into else None
        size, dtype = facts[name].size, facts[name].properties.dtype  # type: ignore[union-attr]
        shards[name] = torch.empty(size, dtype=dtype) if own is None or own.shape != size else own
        return shards[name]

    whole = mapped(rest, wanted)
    dcp.load(shards, storage_reader=reader, no_dist=into is None)
    return whole
