"""The training of a network on latents: averages, compilation, sharding, saving."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Condition, Denoiser, Network
from lcm.core.ema import ema_update_, warmed_up
from lcm.core.errors import UserError
from lcm.core.numbers import Positive, Share
from lcm.core.process import Process
from lcm.models.attention import allow_graphs, check_compiler, fast_attention, recomputed
from lcm.models.codec import LatentCodec
from lcm.models.pipeline import find, load_family, load_prediction_type
from lcm.models.saving import save_pipeline
from lcm.models.sharding import gather, is_sharded, shard
from lcm.models.student import as_network, frozen_copy
from lcm.models.text_to_image import TextToImage
from lcm.modules.base import TrainedModule

log = logging.getLogger(__name__)


class LatentModule(TrainedModule):
    """Trains `net` on latents by an objective: a teacher by denoising, and the base of the distillations.

    process, prediction_type (None: that of the pipeline): of `net`. objective: `process -> Objective`. pipeline: the folder
    or hub id that `net` starts from; `save_model` copies its VAE and text encoders. eval_ema: decay of an average that is
    sampled, validated and saved in place of `net`; None keeps none. w_lr_scale: learning-rate multiplier of the
    zero-initialised projection of w; short runs need > 1. compile: torch.compile for the networks of a training step, for
    batches of one shape; validation and sampling stay eager. gradient_checkpointing: recompute activations to save memory.
    """

    averages = MappingProxyType({"ema_net": "model.eval_ema"})
    zero_init: bool | None = None  # of the projection of w, if the module makes one
    calls: list[tuple[nn.Module, torch.Size, Condition, bool]] | None = None  # recorded network calls for FLOP counting

    def __init__(
        self,
        net: Any,
        process: Process,
        *,
        pipeline: str,
        objective: Callable[..., Any],
        prediction_type: str | None = None,
        eval_ema: Share | None = None,
        w_lr_scale: Positive = 1.0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        if compile:
            check_compiler("model.compile")
        super().__init__(**kwargs)
        self.net, self.process, self.pipeline, self.family = net.train(), process, pipeline, load_family(pipeline)
        self.prediction_type = prediction_type or load_prediction_type(pipeline)
        Denoiser(net, process, self.prediction_type)  # refuses an unknown prediction type
        self.objective = objective(process)
        self.eval_ema, self.w_lr_scale, self.compile_networks = eval_ema, w_lr_scale, compile
        self.ema_net = frozen_copy(net) if eval_ema is not None else None
        self.compiled: dict[nn.Module, Callable[..., Any]] = {}
        if gradient_checkpointing:
            net.enable_gradient_checkpointing(None if compile else recomputed)

    def networks(self) -> list[Any]:
        """Return the trained network, its averages and the teacher, which is as large."""
        return [net for net in (*self.children(), *self.frozen.values()) if isinstance(net, self.family.network_class)]

    def configure_model(self) -> None:
        """Compile, or shard under `trainer=fsdp`, before a strategy wraps the networks."""
        if self.compile_networks:
            # At most a graph for each network, or each of its sharded blocks, at each shape of batches.
            shapes = len(getattr(self.trainer.datamodule, "buckets", ())) or 1  # type: ignore[attr-defined]
            parts = 1 if self.device_mesh is None else sum(isinstance(part, self.family.blocks) for part in self.net.modules())
            allow_graphs(len(self.networks()) * shapes * parts)
        if self.device_mesh is None:
            if self.compile_networks:
                self.compile_all(self.trainer.strategy.root_device)
        elif not is_sharded(self.net):
            compute = torch.bfloat16 if self.trainer.precision.startswith("bf16") else None
            for network in self.networks():
                shard(network, self.family.blocks, self.device_mesh, compute, compile=self.compile_networks)

    def compile_all(self, device: torch.device) -> None:
        for network in self.networks():
            if device.type == "cuda":  # eager networks are slower so: CUDA's group norm gives up this layout
                network.to(memory_format=torch.channels_last)
            self.compiled[network] = torch.compile(network, dynamic=False)

    def settled(self) -> dict[str, Any]:
        return {} if self.zero_init is None else {"model.zero_init": self.zero_init}

    def parameter_groups(self) -> list[dict[str, Any]]:
        [group] = super().parameter_groups()
        projection = self.family.w_projection(self.net)
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
                if not self.family.resizable:
                    raise UserError(
                        f"{self.family.pipelines[0]} is trained at its own size only: set data.resolution={own * factor}"
                    )
                rank_zero_only(log.warning)(
                    "training at %d px a model of %d px images: it is drawn and saved as a model of %d px images "
                    "(data.resolution=%d keeps its own size)", side * factor, own * factor, side * factor, own * factor,
                )  # fmt: skip
            self.note_sample_size(side)
        if self.trainer.precision.startswith("bf16"):
            for network in self.frozen.values():
                network.to(torch.bfloat16)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        draws = self.draws(self.objective.draw, batch.z0, batch_idx)
        loss, logs = self.objective.loss(self.denoisers(self.net), batch, draws)
        self.log_train(loss, logs, len(batch))
        return loss

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        draws = self.draws(self.objective.draw, batch.z0, batch_idx, "val")
        loss, _ = self.objective.loss(self.denoisers(self.best_net), batch, draws)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def denoisers(self, online: nn.Module) -> Any:
        """Return what the objective's loss takes, with `online` as the trained network."""
        return self.denoiser(online)

    def after_optimizer_step(self) -> None:
        if self.ema_net is not None and self.eval_ema is not None:
            decay = warmed_up(self.eval_ema, self.global_step)
            ema_update_(self.ema_net.parameters(), self.net.parameters(), decay, self.left_out_on_device)

    def denoiser(self, net: nn.Module) -> Denoiser:
        return Denoiser(self.network(net), self.process, self.prediction_type)

    def network(self, net: nn.Module) -> Network:
        """Return a network as the core calls it. `calls` records shapes (on the meta device) and whether gradients are kept."""
        network = as_network(self.family, net, self.compiled.get(net) if self.training else None)

        def recorded(z_t: Tensor, time: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
            if self.calls is not None:
                shapes = {name: part.to("meta") for name, part in cond.items()}
                self.calls.append((net, z_t.shape, shapes, torch.is_grad_enabled()))
            with fast_attention(self.device):
                return network(z_t, time, cond, w)

        return recorded

    def note_sample_size(self, side: int) -> None:
        """Have the networks drawn and saved at the size of the training, in latent cells."""
        for network in self.children():
            if isinstance(network, self.family.network_class):
                network.register_to_config(sample_size=side)

    @property
    def method(self) -> str:
        """Return the objective's name: modules are shared by methods whose weights fit each other."""
        return type(self.objective).__name__.removesuffix("Objective")

    @property
    def best_net(self) -> Any:
        """The network to sample, validate and save: the evaluation EMA if there is one."""
        return self.net if self.ema_net is None else self.ema_net

    def text_to_image(self, codec: LatentCodec) -> TextToImage:
        return TextToImage(self.family, self.best_net, self.process, self.prediction_type, codec.to(self.device), self.facts())

    def facts(self) -> dict[str, Any]:
        """Return the content of `lcm.json` in the saved folder."""
        return {
            "method": self.method,
            "pipeline": self.pipeline,
            "steps": self.global_step,
            **self.objective.sampling(),
        }

    def save_model(self, folder: str, net: Any = None, *, dtype: torch.dtype = torch.float16) -> None:
        """Write a pipeline folder with `net`, by default the best one. Every process calls this, the first one writes."""
        net = gather(net or self.best_net)
        if net is not None and self.global_rank == 0:
            save_pipeline(
                folder,
                net,
                family=self.family,
                base=find(self.pipeline),
                scheduler=self.objective.scheduler(self.prediction_type),
                metadata=self.facts(),
                dtype=dtype,
                extra_networks=self.more_networks(),
            )

    def more_networks(self) -> dict[str, Path]:
        """Return the folders of further networks that belong to the saved pipeline, by name."""
        return {}
