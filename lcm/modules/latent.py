"""The training of a network on latents: draws, averages, compilation, sharding, checkpoints, saving."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Condition, Denoiser, Network
from lcm.core.ema import ema_update_, warmed_up
from lcm.core.errors import UserError
from lcm.core.numbers import Positive, Seed, Share, Whole
from lcm.core.process import Process
from lcm.core.random import RankSlice
from lcm.models.attention import allow_graphs, check_compiler, fast_attention, recompute_in_backward
from lcm.models.codec import LatentCodec
from lcm.models.loading import read_json
from lcm.models.lora import drop_frozen, ignore_missing_frozen, is_adapted, with_adapters
from lcm.models.pipeline import find, load_family, load_prediction_type, read_lcm_json
from lcm.models.saving import save_pipeline
from lcm.models.sharding import gather, is_sharded, shard
from lcm.models.student import as_network, frozen_copy
from lcm.models.text_to_image import TextToImage
from lcm.modules.adversary import LatentAdversary
from lcm.modules.checkpoint import check_fixed_settings, check_method, check_tensors
from lcm.modules.optimization import Opponent, Optimization, OptimizerFactory, ScheduleFactory, log_train
from lcm.modules.training_length import TrainingLength

Draws = TypeVar("Draws")  # a dataclass of tensors with one row per sample

log = logging.getLogger(__name__)


class LatentModule(L.LightningModule):
    """Trains `net` on latents by an objective. It trains teachers by denoising, and is the base of the distillations.

    process: the process of `net`. prediction_type: the output of `net`; None: as in the pipeline.
    objective: `process -> ` an objective of `lcm.core.objectives`.
    pipeline: the folder or hub id that `net` starts from. `save_model` copies its VAE and text encoders.
    eval_ema: the decay of an average of `net` that is sampled, validated and saved in place of `net`; None: no average.
    adapters: `{rank, alpha, target_modules}` trains LoRA adapters on the frozen weights of `net`, which may have them already.
        A checkpoint then holds only the adapters and their averages.
    guidance_lr_multiplier: learning-rate multiplier of the zero-initialised projection of w; short runs need > 1.
    compile: torch.compile the networks of a training step; validation and sampling stay eager.
    gradient_checkpointing: recompute activations to save memory.
    The other arguments are those of `Optimization`.
    """

    averages = MappingProxyType({"ema_net": "model.eval_ema"})  # options by the name of the average that they switch on
    zero_init: bool | None = None  # whether the projection of w started at zero; None: the module made no projection
    adversary: LatentAdversary | None
    quantization: Callable[[nn.Linear], nn.Module] | None = None  # `nn.Linear -> nn.Module` for frozen layers
    calls: list[tuple[nn.Module, torch.Size, Condition, bool]] | None = None  # recorded network calls for FLOP counting

    def __init__(
        self,
        net: Any,
        process: Process,
        *,
        pipeline: str,
        objective: Callable[..., Any],
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        prediction_type: str | None = None,
        eval_ema: Share | None = None,
        adapters: Mapping[str, Any] | None = None,
        guidance_lr_multiplier: Positive = 1.0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        clip_norm: Positive | None = 1.0,
        skip_non_finite: Whole = 0,
        seed: Seed = 0,
        opponents: Sequence[Opponent] = (),
    ) -> None:
        if compile:
            check_compiler("model.compile")
        super().__init__()
        self.optimization, self.seed = Optimization(optimizer, lr_schedule, clip_norm, skip_non_finite, opponents), seed
        self.length = TrainingLength()
        self.process, self.pipeline, self.family, self.adapters = process, pipeline, load_family(pipeline), adapters
        if adapters is not None:
            if Path(net.config.get("_name_or_path", "")).parent != find(pipeline):
                raise UserError("model.adapters changes the weights of model.pipeline: set model/net=pipeline")
            net = net if is_adapted(net) else with_adapters(self.family, net, **adapters)
            self.register_state_dict_post_hook(drop_frozen)
            self.register_load_state_dict_post_hook(ignore_missing_frozen)
        self.net = net.train()
        self.prediction_type = prediction_type or load_prediction_type(pipeline)
        Denoiser(net, process, self.prediction_type)  # refuses an unknown prediction type
        channels, latent = net.config["in_channels"], read_json(find(pipeline) / "vae" / "config.json")["latent_channels"]
        if channels != latent:
            raise UserError(
                f"model.net takes latents of {channels} channels, and the VAE of {pipeline} makes {latent}: use "
                f"model/net=pipeline, or set model.net.in_channels={latent} model.net.out_channels={latent}"
            )
        self.objective = objective(process)
        self.eval_ema, self.guidance_lr_multiplier, self.compile_networks = eval_ema, guidance_lr_multiplier, compile
        self.ema_net = frozen_copy(net) if eval_ema is not None else None
        self.adversary = None
        self.frozen: dict[str, nn.Module] = {}  # a plain dict: not in the state dict, DDP or the optimizer
        self.compiled: dict[nn.Module, Callable[..., Any]] = {}
        self.register_load_state_dict_pre_hook(check_tensors)
        if gradient_checkpointing:
            fakes = [other.network for other in opponents if isinstance(other.network, self.family.network_class)]
            for trained in (net, *fakes):
                trained.enable_gradient_checkpointing(None if compile else recompute_in_backward)

    def networks(self) -> list[Any]:
        """Return the trained network, its averages and the teacher, without discriminators and rewards."""
        return [net for net in (*self.children(), *self.frozen.values()) if isinstance(net, self.family.network_class)]

    @property
    def world_size(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    # setup

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.optimization, self.length]

    def configure_optimizers(self) -> Any:
        return self.optimization.configure(self.parameter_groups(), self.trainer.max_steps)

    def configure_model(self) -> None:
        """Compile, or shard under `trainer=fsdp`, before a strategy wraps the networks."""
        if self.adversary is not None and self.device_mesh is not None and self.compile_networks:
            raise UserError("model.adversary cannot read features of compiled shards: set model.compile=false, or trainer=ddp")
        if self.quantization is not None and self.device_mesh is not None:
            raise UserError("quantised layers cannot be sharded: set model/quantization=null, or trainer=ddp")
        if self.adapters is not None and self.device_mesh is not None:
            raise UserError("adapters cannot be sharded: train them with trainer=ddp")
        if self.compile_networks:
            # At most two graphs, with gradients and without, for each network or each sharded block at each batch shape.
            shapes = len(getattr(self.trainer.datamodule, "buckets", ())) or 1  # type: ignore[attr-defined]
            parts = 1 if self.device_mesh is None else sum(isinstance(part, self.family.blocks) for part in self.net.modules())
            allow_graphs(2 * len(self.networks()) * shapes * parts)
        if self.device_mesh is None:
            if self.compile_networks:
                self.compile_all(self.trainer.strategy.root_device)
        elif not is_sharded(self.net):
            compute = torch.bfloat16 if self.trainer.precision.startswith("bf16") else None
            for network in self.networks():
                shard(network, self.family.blocks, self.device_mesh, compute, compile=self.compile_networks)

    def compile_all(self, device: torch.device) -> None:
        for network in self.networks():
            if device.type == "cuda":  # slower for eager networks: CUDA's group norm does not keep this layout
                network.to(memory_format=torch.channels_last)
            self.compiled[network] = torch.compile(network, dynamic=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups of trained parameters. The projection of w is a separate group."""
        trained = [p for p in self.parameters() if p.requires_grad]
        projection = self.family.w_projection(self.net)
        if projection is None:
            return [{"params": trained}]
        rest = [p for p in trained if p is not projection]
        return [{"params": rest}, {"params": [projection], "lr_scale": self.guidance_lr_multiplier}]

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device).requires_grad_(False).eval()
        data: Any = getattr(self.trainer, "datamodule", None)
        if (side := getattr(data, "sample_size", None)) is not None:
            net_side, factor = self.net.config["sample_size"], data.resolution // side
            if isinstance(net_side, int) and net_side != side:
                pixels, net_pixels = side * factor, net_side * factor
                if not self.family.resizable:
                    raise UserError(
                        f"{self.family.pipelines[0]} is trained at its own size only: set data.resolution={net_pixels}"
                    )
                rank_zero_only(log.warning)(
                    "training at %d px a model of %d px images: the trained model is sampled and saved at %d px "
                    "(data.resolution=%d keeps its own size)", pixels, net_pixels, pixels, net_pixels,
                )  # fmt: skip
            self.set_sample_size(side)
        if self.trainer.precision.startswith("bf16"):
            for network in self.frozen.values():
                network.to(torch.bfloat16)

    # steps

    def draws(self, draw: Callable[..., Draws], z0: Tensor, batch_idx: int, stage: str = "train", **options: Any) -> Draws:
        """Return this rank's rows of `draw(z0 of all ranks, generator, **options)`, see `RankSlice`."""
        rows = RankSlice(self.device, self.seed, stage, batch_idx, rank=self.global_rank, world_size=self.world_size)
        parts = []
        for size, rng, rank_slice in rows.blocks(len(z0)):
            draws = draw(z0[:1].expand(size, *z0.shape[1:]), rng, **options)
            parts.append({name: values[rank_slice] for name, values in vars(draws).items()})
        return type(draws)(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        draws = self.draws(self.objective.draw, batch.z0, batch_idx)
        loss, logs = self.objective.loss(self.denoisers(self.net), batch, draws)
        log_train(self, loss, logs, len(batch))
        return loss

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        draws = self.draws(self.objective.draw, batch.z0, batch_idx, "val")
        loss, _ = self.objective.loss(self.denoisers(self.best_net), batch, draws)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def denoisers(self, online: nn.Module) -> Any:
        """Return the networks of the objective's loss, with `online` as the trained one."""
        return self.denoiser(online)

    @property
    def share(self) -> float:
        """Return the share of a batch in an update of the weights, below 1 under gradient accumulation."""
        return 1 / self.trainer.accumulate_grad_batches

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self.optimization.skipped_update:
            self.after_optimizer_step()

    def after_optimizer_step(self) -> None:
        """Update the averages, once per optimizer step, also under gradient accumulation."""
        if self.ema_net is not None and self.eval_ema is not None:
            decay = warmed_up(self.eval_ema, self.global_step)
            ema_update_(self.ema_net.parameters(), self.net.parameters(), decay, self.optimization.skipped_on_device)

    def denoiser(self, net: nn.Module) -> Denoiser:
        return Denoiser(self.network(net), self.process, self.prediction_type)

    def network(self, net: nn.Module, *, compiled: bool = True) -> Network:
        """Return a network as the core calls it. compiled: use its compiled form, if any, in a training step.

        Unless `self.calls` is None, each call appends (network, shape of z, condition on the meta device, gradients or not).
        """
        network = as_network(self.family, net, self.compiled.get(net) if self.training and compiled else None)

        def recorded(z_t: Tensor, time: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
            if self.calls is not None:
                shapes = {name: part.to("meta") for name, part in cond.items()}
                self.calls.append((net, z_t.shape, shapes, torch.is_grad_enabled()))
            with fast_attention(self.device):
                return network(z_t, time, cond, w)

        return recorded

    def set_sample_size(self, side: int) -> None:
        """Set the size at which the networks are sampled and saved. side: latent pixels per side."""
        for network in self.children():
            if isinstance(network, self.family.network_class):
                network.register_to_config(sample_size=side)

    # checkpoints and models

    @property
    def method(self) -> str:
        """Return the objective's name. Checkpoints store it, because the tensors of two methods may fit each other."""
        return type(self.objective).__name__.removesuffix("Objective") + (" of adapters" if self.adapters is not None else "")

    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that cannot change once a training has begun, by option."""
        return {} if self.zero_init is None else {"model.zero_init": self.zero_init}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["method"], checkpoint["settled"] = self.method, self.fixed_settings()
        checkpoint["images"], checkpoint["seconds"] = self.length.images, self.length.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_method(checkpoint, self.method)
        check_fixed_settings(checkpoint, self.fixed_settings())
        self.length.images, self.length.seconds = checkpoint.get("images", 0), checkpoint.get("seconds", 0.0)

    @property
    def best_net(self) -> Any:
        """Return the network to sample, validate and save: the average of `eval_ema`, or `net` without an average."""
        return self.net if self.ema_net is None else self.ema_net

    def text_to_image(self, codec: LatentCodec) -> TextToImage:
        """Return a sampler of images with `best_net`."""
        codec = codec.to(self.device)
        return TextToImage(self.family, self.best_net, self.process, self.prediction_type, codec, self.lcm_json())

    def lcm_json(self) -> dict[str, Any]:
        """Return the content of `lcm.json` in the saved folder."""
        metadata: dict[str, Any] = {
            "method": self.method,
            "pipeline": self.pipeline,
            "steps": self.global_step,
            "images": self.length.images,
            "seconds": round(self.length.seconds, 1),
            **self.objective.sampling(),
        }
        if self.adapters is not None:
            rank, alpha = self.adapters["rank"], self.adapters.get("alpha")
            metadata |= {"rank": rank, "alpha": rank if alpha is None else alpha}
        if rewards := self.rewards():
            metadata["rewards"] = rewards
        return metadata

    def rewards(self) -> list[dict[str, Any]]:
        """Return the rewards that this training or earlier trainings of the student raised. Tables leave their scores out."""
        reward: Any = self.frozen.get("reward")
        earlier = read_lcm_json(find(self.pipeline)).get("rewards", [])
        return earlier if reward is None or reward.description in earlier else [*earlier, reward.description]

    def w_metadata(self) -> dict[str, Any]:
        """Return the range of w for `lcm.json`: the range of the network's input, or of the teacher's guidance."""
        w_range = (self.objective.w_min, self.objective.w_max)
        if self.family.takes_w(self.net):
            return dict(zip(("w_min", "w_max"), w_range, strict=True))
        return {"teacher_w": list(w_range)} if any(w_range) else {}

    def save_model(self, folder: str, net: Any = None, *, dtype: torch.dtype = torch.float16) -> None:
        """Write a pipeline folder with `net`; None: `best_net`. Call it on every rank. Rank 0 writes."""
        net = gather(net or self.best_net)
        if net is not None and self.global_rank == 0:
            save_pipeline(
                folder,
                net,
                family=self.family,
                base=find(self.pipeline),
                scheduler=self.objective.scheduler(self.prediction_type),
                metadata=self.lcm_json(),
                dtype=dtype,
                extra_networks=self.extra_networks(),
            )

    def extra_networks(self) -> dict[str, Path]:
        """Return the folders of further networks of the saved pipeline, by name."""
        return {}
