"""An estimate of the GPU memory that distilling a UNet takes, from shapes: without weights and without a GPU."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lcm.bench.measure import Table
from lcm.core.guidance import W_DIM
from lcm.models.families.sd import StableDiffusion

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2  # bytes


class NormsInFloat32(TorchFunctionMode):
    """Compute norms in float32 and return float32, as autocast does on CUDA but not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def in_bfloat16(config: dict[str, Any]) -> UNet2DConditionModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # a network of fake tensors cannot be converted later
    try:
        return UNet2DConditionModel(**config, time_cond_proj_dim=W_DIM).train()
    finally:
        torch.set_default_dtype(before)


def activations(config: dict[str, Any], batch: int, *, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps between a student's forward and backward pass, without its parameters.

    Tensors are fake: they have shapes and storages, but no memory. Weights and matmuls are in bfloat16, norms in float32.
    """
    with FakeTensorMode(), torch.device("cpu"):
        unet = in_bfloat16(config)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        kept: dict[int, Any] = {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # a held storage keeps its address
            return value

        size, empty = config["sample_size"], partial(torch.empty, dtype=torch.bfloat16)
        inputs = empty(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
        cond = empty(batch, 77, config["cross_attention_dim"])
        more = {"text_embeds": empty(batch, 1280), "time_ids": empty(batch, 6)}
        with NormsInFloat32(), torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda value: value):
            unet(*inputs, cond, timestep_cond=empty(batch, 256), added_cond_kwargs=more)
        return sum(storage.nbytes() for storage in kept.values())


def shares(student: UNet2DConditionModel, gpus: int) -> tuple[int, int]:
    """Return the number of parameters in the first of `gpus` shards, and in the whole network."""
    shapes = [p.shape for p in student.parameters()]
    return sum(-(-shape[0] // gpus) * shape[1:].numel() for shape in shapes), sum(shape.numel() for shape in shapes)


def gathered(student: UNet2DConditionModel) -> int:
    """Return the bytes of whole blocks under FSDP2.

    The root and two blocks (one runs, the next is fetched) are in bfloat16. The gradients of one block are in bfloat16 and,
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
        "buffers": (FLOAT32 + BFLOAT16) * whole if strategy == "ddp" else gathered(student),
    }  # fmt: skip


def measure(*, networks: dict[str, dict[str, Any]], batch_sizes: dict[str, int], gpus: int) -> Table:
    """networks: arguments of UNet2DConditionModel by name. batch_sizes: images per GPU by the same names."""
    rows = []
    for name, network in networks.items():
        config, images = {key: value for key, value in network.items() if key != "_target_"}, batch_sizes[name]
        plain, recomputed = (activations(config, images, checkpointing=option) for option in (False, True))
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
