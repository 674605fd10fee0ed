"""Lightning's strategy for FSDP2, with this project's checkpoints."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lcm.core.errors import UserError
from lcm.core.numbers import Count
from lcm.runtime import sharded_checkpoint as sharded


class FullySharded(ModelParallelStrategy):
    """Each rank holds its shards of every network. A module's `configure_model` shards its networks over `device_mesh`.

    replicas: the number of groups of ranks (HSDP). Each group holds all shards. 1 shards over all ranks.
    sharded_checkpoints: true: a checkpoint is a folder to which every rank writes its shards. false: a checkpoint is one file,
    written by rank 0, as with other strategies. Both kinds can be loaded with either setting and at any world size.
    """

    def __init__(self, *, replicas: Count = 1, sharded_checkpoints: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoints)
        self.replicas, self.sharded_checkpoints = replicas, sharded_checkpoints

    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        if self.replicas < 1 or world % self.replicas:
            raise UserError(f"trainer.strategy.replicas={self.replicas} does not divide the {world} processes: set a divisor")
        assert self.lightning_module is not None
        if not is_overridden("configure_model", self.lightning_module):
            raise UserError(f"{type(self.lightning_module).__name__} cannot be sharded: train it with trainer=ddp")
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            shape = (self.replicas, world // self.replicas)
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicas", "shards"))
        self.lightning_module._device_mesh = mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if self.sharded_checkpoints:
            sharded.write(checkpoint, path)
            return

        def gathered(name: str, value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()  # collective
                return value.cpu() if self.is_global_zero else None
            return value

        whole = sharded.map_values(checkpoint, gathered)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore networks and optimizers from a file or a folder, and return the rest of the checkpoint."""
        assert self.lightning_module is not None
        path, state = Path(self.broadcast(checkpoint_path)), self.lightning_module.state_dict()
        opponents = getattr(getattr(self.lightning_module, "optimization", None), "opponents", [])
        optimizers = [*self.optimizers, *(opponent.optimizer for opponent in opponents)] if self.optimizers else []
        trained = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]

        def counterpart(name: str) -> Tensor | None:
            """Return this run's tensor with the name of a checkpoint's tensor, or None."""
            kind, *keys = name.split("/")
            if kind == "state_dict":
                return state.get(keys[0])
            index = int(keys[0])  # the number of the optimizer
            return trained[index][int(keys[2])].detach() if keys[1] == "state" and index < len(trained) else None

        def distributed(name: str, value: Any) -> Any:
            like = counterpart(name)
            if not isinstance(value, Tensor) or not isinstance(like, DTensor) or like.shape != value.shape:
                return value
            return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # no communication

        def destination(name: str) -> Tensor | None:
            like = counterpart(name)
            return like if like is None or name.startswith("state_dict") else torch.empty_like(like)

        if path.is_dir():
            checkpoint = sharded.read(path, destination)
        else:
            checkpoint = sharded.map_values(self.checkpoint_io.load_checkpoint(path, weights_only=True), distributed)
        self.lightning_module.load_state_dict(checkpoint.pop("state_dict"), strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(optimizers, checkpoint.pop("optimizer_states"), strict=False):
            optimizer.load_state_dict(state)
        return checkpoint
