"""What the modules on latents share: the UNet's housekeeping, sampling, saving a pipeline folder."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lcm.core.condition import Condition, each
from lcm.core.ema import ema_update_, warmed_up
from lcm.core.networks import Network
from lcm.core.numbers import Positive, Share
from lcm.core.schedule import NoiseSchedule
from lcm.data.codec import LatentCodec
from lcm.models.generate import LatentModel
from lcm.models.kernels import allow_graphs, check_compiler, fast_attention, recomputed
from lcm.models.saving import save_pipeline
from lcm.models.sharding import UNITS, is_sharded, shard, whole
from lcm.models.student import as_network, frozen_copy
from lcm.modules.base import TrainedModule

log = logging.getLogger(__name__)


class LatentModule(TrainedModule):
    """Trains `net`, a UNet on latents.

    pipeline: the folder or hub id whose VAE and text encoder `save_model` puts beside the trained UNet.
    eval_ema: decay of a second, averaged copy that is sampled, validated and saved in place of `net`; None keeps none.
    w_lr_scale: how many times faster than the rest a student's projection of w learns, which a short training needs to leave
    zero. compile: the networks of a training step are compiled by torch.compile, for batches of one shape; validation and
    sampling stay eager. gradient_checkpointing: recompute activations, for memory.
    """

    averages = MappingProxyType({"ema_net": "model.eval_ema"})
    consistency = False  # whether the trained network is sampled by Algorithm 3
    zero_init: bool | None = None  # of the projection of w, if the module makes one
    calls: list[tuple[UNet2DConditionModel, torch.Size, Condition, bool]] | None = None  # of networks, where they are noted

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        pipeline: str,
        eval_ema: Share | None = None,
        w_lr_scale: Positive = 1.0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        if compile:
            check_compiler("model.compile")
        super().__init__(**kwargs)
        self.net, self.schedule, self.pipeline = net.train(), schedule, pipeline
        self.eval_ema, self.w_lr_scale, self.compile_networks = eval_ema, w_lr_scale, compile
        self.ema_net = frozen_copy(net) if eval_ema is not None else None
        self.compiled: dict[UNet2DConditionModel, Callable[..., Any]] = {}
        if gradient_checkpointing:
            net.enable_gradient_checkpointing(None if compile else recomputed)

    def unets(self) -> list[UNet2DConditionModel]:
        """The student, its averages and the teacher, which is as large."""
        return [net for net in (*self.children(), *self.frozen.values()) if isinstance(net, UNet2DConditionModel)]

    def configure_model(self) -> None:
        """Before a strategy wraps the networks, which `trainer=fsdp` has sharded."""
        if self.compile_networks:
            # At most a graph for each network, or each of its sharded blocks, at each shape of batches.
            shapes = len(getattr(self.trainer.datamodule, "buckets", ())) or 1  # type: ignore[attr-defined]
            blocks = 1 if self.device_mesh is None else sum(isinstance(part, UNITS) for part in self.net.modules())
            allow_graphs(len(self.unets()) * shapes * blocks)
        if self.device_mesh is None:
            if self.compile_networks:
                self.compile_unets(self.trainer.strategy.root_device)
        elif not is_sharded(self.net):
            compute = torch.bfloat16 if self.trainer.precision.startswith("bf16") else None
            for network in self.unets():
                shard(network, self.device_mesh, compute, compile=self.compile_networks)

    def compile_unets(self, device: torch.device) -> None:
        for network in self.unets():
            if device.type == "cuda":  # eager ones are slower so: CUDA's group norm gives up this layout
                network.to(memory_format=torch.channels_last)
            self.compiled[network] = torch.compile(network, dynamic=False)

    def settled(self) -> dict[str, Any]:
        return {} if self.zero_init is None else {"model.zero_init": self.zero_init}

    def parameter_groups(self) -> list[dict[str, Any]]:
        [group] = super().parameter_groups()
        projection = getattr(self.net.time_embedding.cond_proj, "weight", None)
        if projection is None:
            return [group]
        rest = [p for p in group["params"] if p is not projection]
        return [{"params": rest}, {"params": [projection], "lr_scale": self.w_lr_scale}]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if (side := getattr(data, "sample_size", None)) is not None:
            own, factor = self.net.config["sample_size"], data.resolution // side
            if isinstance(own, int) and own != side:
                rank_zero_only(log.warning)(
                    "training at %d px a model of %d px images: it is drawn and saved as a model of %d px images "
                    "(data.resolution=%d keeps its own size)", side * factor, own * factor, side * factor, own * factor,
                )  # fmt: skip
            self.note_sample_size(side)
        if self.trainer.precision.startswith("bf16"):
            for network in self.frozen.values():
                network.to(torch.bfloat16)

    def after_optimizer_step(self) -> None:
        if self.ema_net is not None and self.eval_ema is not None:
            decay = warmed_up(self.eval_ema, self.global_step)
            ema_update_(self.ema_net.parameters(), self.net.parameters(), decay, self.left_out_on_device)

    def network(self, unet: UNet2DConditionModel) -> Network:
        """A UNet as the objectives call it; `calls` notes shapes (on the meta device) and whether gradients are kept."""
        net = as_network(unet, self.compiled.get(unet) if self.training else None)

        def noted(z_t: Tensor, t: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
            if self.calls is not None:
                shapes = each(lambda part: part.to("meta"), cond)
                self.calls.append((unet, z_t.shape, shapes, torch.is_grad_enabled()))
            with fast_attention(self.device):
                return net(z_t, t, cond, w)

        return noted

    def note_sample_size(self, side: int) -> None:
        """Have the networks drawn and saved at the size of the training, in latent cells."""
        for network in self.children():
            if isinstance(network, UNet2DConditionModel):
                network.register_to_config(sample_size=side)

    @property
    def best_net(self) -> UNet2DConditionModel:
        """The network to sample, validate and save: the evaluation EMA if there is one."""
        return self.net if self.ema_net is None else self.ema_net

    def latent_model(self, codec: LatentCodec) -> LatentModel:
        return LatentModel(self.best_net, self.schedule, codec.to(self.device), self.consistency, self.facts())

    def facts(self) -> dict[str, Any]:
        """What `lcm.json` of the saved folder says."""
        return {"method": type(self).__name__, "pipeline": self.pipeline, "steps": self.global_step}

    def save_model(self, folder: str, net: UNet2DConditionModel | None = None, *, dtype: torch.dtype = torch.float16) -> None:
        """Write a pipeline folder with `net`, by default the best one; called by every process, written by the first."""
        net = whole(net or self.best_net)
        if net is not None and self.global_rank == 0:
            save_pipeline(
                folder,
                net,
                self.schedule,
                base=self.pipeline,
                consistency=self.consistency,
                facts=self.facts(),
                dtype=dtype,
                more=self.more_networks(),
            )

    def more_networks(self) -> dict[str, Path]:
        """Folders of further UNets that belong to the saved pipeline, by name."""
        return {}
