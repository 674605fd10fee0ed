"""Checkpoints in a folder, to which every rank writes its own shards.

    shard-<n>-model-00001-of-00001.safetensors   the shards of rank n, with their offsets
    rest.ckpt                                    everything else, loaded with weights_only=True
    files.json                                   the size and CRC-32 of each file above

torch.distributed.checkpoint writes and reads the shards as safetensors: its own format loads a pickle, which can run code.
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

from lcm.runtime.atomic_io import remove, sync_names, whole_file
from lcm.runtime.integrity import LAST, LISTING, PREVIOUS, size_and_crc

KEYS = ("state_dict", "optimizer_states")
SHARDED = "in the shards"  # replaces a sharded tensor in rest.ckpt
Tree = dict[str, Any]
Change = Callable[[str, Any], Any]


def map_values(checkpoint: Tree, change: Change) -> Tree:
    """Return a copy of a checkpoint with `change(name, value)` in place of each value under `KEYS`.

    Names look like `state_dict/net.conv_in.weight` and `optimizer_states/0/state/5/exp_avg`.
    """

    def walk(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(f"{name}/{key}", inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(f"{name}/{index}", inner) for index, inner in enumerate(value))
        return change(name, value)

    return {**checkpoint, **{key: walk(key, checkpoint[key]) for key in KEYS if key in checkpoint}}


def write(checkpoint: Tree, target: Path) -> None:
    """Write a checkpoint with DTensors (collective). A kill at any moment leaves the old checkpoint or the new one."""
    partial, shards = target.with_name(target.name + ".partial"), {}

    def take_out(name: str, value: Any) -> Any:
        if isinstance(value, DTensor):
            shards[name] = value.detach()
            return SHARDED
        return value

    rest = map_values(checkpoint, take_out)
    if dist.get_rank() == 0:
        remove(partial)
        partial.mkdir(parents=True)
        with whole_file(partial / "rest.ckpt") as file:
            torch.save(rest, file)
    dist.barrier()
    dcp.save(shards, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    rank_files = sorted(file.name for file in partial.iterdir())[dist.get_rank() :: dist.get_world_size()]
    listings: list[Tree] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(listings, {name: size_and_crc(partial / name) for name in rank_files})
    if dist.get_rank() == 0:
        with whole_file(partial / LISTING) as file:
            file.write(json.dumps({name: entry for listing in listings for name, entry in listing.items()}, indent=2).encode())
        with replacing(target):
            partial.rename(target)
    dist.barrier()


@contextmanager
def replacing(target: Path) -> Iterator[None]:
    """Move the checkpoint at `target` aside, so that the context can rename a new one to `target`. Then remove the oldest.

    last.ckpt becomes previous.ckpt. A kill at any moment leaves a complete `*.ckpt`.
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
    """Return the checkpoint in a folder.

    into: `name -> ` the DTensor that receives a tensor's shards, or None for a whole tensor (collective). None: this process
    alone reads whole tensors on the CPU.
    """
    rest = torch.load(folder / "rest.ckpt", map_location="cpu", weights_only=True)
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata().state_dict_metadata
    shards: dict[str, Tensor] = {}

    def wanted(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value != SHARDED:
            return value
        like = into(name) if into else None
        size, dtype = metadata[name].size, metadata[name].properties.dtype  # type: ignore[union-attr]
        shards[name] = torch.empty(size, dtype=dtype) if like is None or like.shape != size else like
        return shards[name]

    whole = map_values(rest, wanted)
    dcp.load(shards, storage_reader=reader, no_dist=into is None)
    return whole
