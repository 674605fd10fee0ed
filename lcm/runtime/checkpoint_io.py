"""Checkpoint files that are complete or absent."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from lcm.core.errors import UserError
from lcm.runtime import sharded_checkpoint as sharded
from lcm.runtime.atomic_io import whole_file
from lcm.runtime.integrity import LAST, PREVIOUS, damage, verified


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoints. A kill at any moment leaves a complete checkpoint.

    Lightning's own writer goes through $TMPDIR and can lose the old and the new checkpoint. A new last.ckpt renames the old one
    to previous.ckpt. asynchronous: training continues while a copy in host memory is written. The next save, or the end of the
    training, waits for the write and raises its error. (Lightning's AsyncCheckpointIO copies on the GPU and queues up copies.)
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.finish()
        if self.writer is None:
            self.write(checkpoint, Path(path))
        else:
            checkpoint = apply_to_collection(checkpoint, torch.Tensor, copy_to_host)
            self.writing = self.writer.submit(self.write, checkpoint, Path(path))

    def write(self, checkpoint: dict[str, Any], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        keep = target.with_name(PREVIOUS) if target.name == LAST else None
        if keep is not None and target not in verified and damage(target):
            keep = None  # a damaged file must not replace the undamaged previous.ckpt
        folders = target.is_dir() or (keep is not None and keep.is_dir())
        with sharded.replacing(target) if folders else nullcontext(), whole_file(target, keep=keep) as file:
            torch.save(checkpoint, file)
        verified.add(target)

    def finish(self) -> None:
        """Wait for the write in progress, and raise its error."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint on the CPU. Raises UserError if it is damaged."""
        self.finish()
        path = Path(path)
        if path not in verified and (reason := damage(path)):
            raise UserError(f"{path} is damaged ({reason}): give another checkpoint")
        verified.add(path)
        return sharded.read(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        self.finish()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.finish()


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
