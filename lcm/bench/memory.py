"""An estimate of the GPU memory that distilling a UNet takes, from shapes: without weights and without a GPU."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lcm.app.composition import compose
from lcm.bench.measure import Table
from lcm.core.guidance import W_DIM
from lcm.models.families.sd import StableDiffusion

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2  # bytes
FROZEN = {"nf4": 0.5 + 1 / 64}  # bytes of a weight of a quantised layer, with its scale
MOMENTS = {"AdamW": 2 * FLOAT32, "AdamW8bit": 2 * (1 + FLOAT32 / 256)}  # bytes of a parameter


class NormsInFloat32(TorchFunctionMode):
    """Compute norms in float32 and return float32, as autocast does on CUDA but not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


class SavedBytes(NamedTuple):
    """Bytes that autograd saves between the forward and the backward pass. block: the bytes of the block that saves most."""

    all: int
    block: int


def on_meta(config: dict[str, Any], rank: int | None = None, **options: Any) -> Any:
    """Return a UNet on the meta device. rank: the rank of trained adapters; None: all weights are trained."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config, **options)
        if rank is not None:
            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=rank, target_modules=list(StableDiffusion.lora_targets)))
    return unet.train()


def activations(config: dict[str, Any], batch: int, *, checkpointing: bool, rank: int | None = None) -> SavedBytes:
    """Return the bytes that autograd saves in a student's forward pass, without parameters. rank: see `on_meta`.

    Tensors are fake: they have shapes and storages, but no memory. Weights and matmuls are in bfloat16, norms in float32.
    """
    unet = on_meta(config, rank, **({"time_cond_proj_dim": W_DIM} if rank is None else {}))
    with FakeTensorMode(), torch.device("cpu"):
        for layer in unet.modules():
            for name, p in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16), requires_grad=p.requires_grad))
        if checkpointing:
            unet.enable_gradient_checkpointing()
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        saved_storages: dict[int, Any] = {}
        blocks, running = Counter[int](), 0  # bytes by the id of a block, 0 outside of blocks; the id of the running block

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in weights and storage._cdata not in saved_storages:
                saved_storages[storage._cdata] = storage  # a held storage keeps its address
                blocks[running] += storage.nbytes()
            return value

        def enter(block: Any, _: Any) -> None:
            nonlocal running
            running = id(block)

        def leave(*_: Any) -> None:
            nonlocal running
            running = 0

        for module in unet.modules():
            if isinstance(module, StableDiffusion.blocks):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)
        size, empty = config["sample_size"], partial(torch.empty, dtype=torch.bfloat16)
        inputs = empty(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
        cond = empty(batch, 77, config["cross_attention_dim"])
        extra_inputs = {"text_embeds": empty(batch, 1280), "time_ids": empty(batch, 6)}
        with NormsInFloat32(), torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda value: value):
            unet(*inputs, cond, timestep_cond=None if rank else empty(batch, W_DIM), added_cond_kwargs=extra_inputs)
        return SavedBytes(blocks.total(), max((size for block, size in blocks.items() if block), default=0))


def shares(student: UNet2DConditionModel, gpus: int) -> tuple[int, int]:
    """Return the number of parameters in the first of `gpus` shards, and in the whole network."""
    shapes = [p.shape for p in student.parameters()]
    return sum(-(-shape[0] // gpus) * shape[1:].numel() for shape in shapes), sum(shape.numel() for shape in shapes)


def gathered_bytes(student: UNet2DConditionModel) -> int:
    """Return the bytes of gathered blocks under FSDP2.

    The root and two blocks (one runs, the next is gathered) are in bfloat16. The gradients of one block are in bfloat16 and,
    for their reduction, in float32.
    """
    blocks = [
        sum(p.numel() for p in block.parameters()) for block in student.modules() if isinstance(block, StableDiffusion.blocks)
    ]
    root = sum(p.numel() for p in student.parameters()) - sum(blocks)
    return BFLOAT16 * (root + 2 * max(blocks)) + (BFLOAT16 + FLOAT32) * max(blocks)


def states(config: dict[str, Any], strategy: str, gpus: int) -> dict[str, int]:
    """Return the bytes of each state on one of `gpus` GPUs. strategy: "ddp" or "fsdp"."""
    with torch.device("meta"):
        student = StableDiffusion({}, config).with_w(UNet2DConditionModel(**config))
    shard, whole = shares(student, gpus)
    count = whole if strategy == "ddp" else shard
    return {
        "student": FLOAT32 * count, "gradients": FLOAT32 * count, "AdamW": 2 * FLOAT32 * count, "target": FLOAT32 * count,
        "teacher": BFLOAT16 * count,
        # the gradient buckets of DDP and autocast's copies of the weights, or the blocks that FSDP2 gathers
        "buffers": (FLOAT32 + BFLOAT16) * whole if strategy == "ddp" else gathered_bytes(student),
    }  # fmt: skip


def measure(*, networks: dict[str, dict[str, Any]], batch_sizes: dict[str, int], gpus: int) -> Table:
    """Return the memory of a distillation on `gpus` GPUs, by network and strategy.

    networks: arguments of UNet2DConditionModel by name. batch_sizes: images per GPU by the same names.
    """
    rows = []
    for name, network in networks.items():
        config, images = {key: value for key, value in network.items() if key != "_target_"}, batch_sizes[name]
        plain, recomputed = (activations(config, images, checkpointing=option).all for option in (False, True))
        for strategy in ("ddp", "fsdp"):
            total = sum(states(config, strategy, gpus).values())
            rows.append({
                "UNet": name,
                "images a GPU": images,
                "trainer": f"trainer={strategy}",
                "states": total / GIB,
                "all": (total + plain) / GIB,
                "all, with model.gradient_checkpointing=true": (total + recomputed) / GIB,
            })  # fmt: skip
    note = (
        f"GiB on one of {gpus} GPUs with bf16-mixed, an estimate from shapes. States are the student, its gradients, the AdamW "
        "moments, the target, the teacher and the buffers of the strategy. The rest of `all` is what autograd keeps of the "
        "student's forward pass. Add the recomputed block, the passes without gradients, the kernels' workspace, the "
        "allocator's gaps, the VAE and the text encoder."
    )
    return Table("Memory of training", rows, note)


def states_of(model: Any, config: dict[str, Any]) -> dict[str, float]:
    """Return the bytes of each state of a distillation on one GPU. model: its configuration."""
    base = on_meta(config)
    linear = sum(layer.weight.numel() for layer in base.modules() if isinstance(layer, nn.Linear))
    whole = trained = base.num_parameters()
    if model.adapters is not None:
        trained = on_meta(config, model.adapters.rank).num_parameters() - whole
    quantization = model.get("quantization")
    short = FROZEN[quantization._target_.rpartition(".")[2]] if quantization else BFLOAT16
    averages = bool(model.ema_decay) + bool(model.eval_ema)
    return {
        "frozen weights": BFLOAT16 * (whole - linear) + short * linear,  # the teacher, or the frozen base of the adapters
        "trained": (1 + averages) * FLOAT32 * trained,
        "gradients": FLOAT32 * trained,
        "moments": MOMENTS[model.optimizer._target_.rpartition(".")[2]] * trained,
        "autocast's copies": BFLOAT16 * trained,
    }


def one_gpu(
    *, networks: dict[str, dict[str, Any]], experiments: Mapping[str, str], gpus: Sequence[str | None], sizes: Sequence[int],
    reserve: float,
) -> Table:  # fmt: skip
    """Return the memory of experiments on one consumer GPU.

    networks: arguments of UNet2DConditionModel by name. experiments: the name of a network by "<experiment> <overrides>".
    gpus: options of the group `gpu`. sizes: the memory of GPUs in GiB. reserve: GiB for CUDA, workspaces and gaps.
    """
    rows = []
    for experiment, network in experiments.items():
        config = {key: value for key, value in networks[network].items() if key != "_target_"}
        overrides = f"experiment={experiment}".split()
        adapters = compose("train", overrides).model.adapters
        rank = None if adapters is None else adapters.rank
        plain, recomputed = (activations(config, 1, checkpointing=option, rank=rank) for option in (False, True))
        for gpu in gpus:
            cfg = compose("train", [*overrides, *([f"gpu={gpu}"] if gpu else [])])
            # The backward pass recomputes one block at a time.
            image = recomputed.all + plain.block if cfg.model.gradient_checkpointing else plain.all
            states, images = sum(states_of(cfg.model, config).values()), cfg.data.batch_size
            total = (states + images * image) / GIB
            fitting = [size for size in sizes if total + reserve <= size]
            rows.append({
                "experiment": experiment,
                "gpu": gpu,
                "images a batch": images,
                "states": states / GIB,
                "all": total,
                "fits": f"{fitting[0]} GB" if fitting else f"none of {', '.join(map(str, sizes))} GB",
            })  # fmt: skip
    note = (
        "GiB of one GPU with bf16-mixed, an estimate from recipes and shapes, not a measurement. States are the frozen "
        "weights, the trained weights, their averages, gradients, moments and bfloat16 copies. `all` adds what autograd keeps "
        f"of the student's forward pass and a recomputed block. `fits` leaves {reserve:g} GiB for CUDA, workspaces and gaps. "
        "The VAE and the text encoders are not included: with stored latents and text embeddings they rest in host memory."
    )
    return Table("Memory of one consumer GPU", rows, note)
