"""Bytes a GPU needs to distil a UNet: counted on shapes, without weights and without a GPU."""

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
    """CUDA's autocast computes norms in float32 and hands on their float32 result, the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {name: a.float() if isinstance(a, Tensor) else a for name, a in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def in_bfloat16(config: dict[str, Any]) -> UNet2DConditionModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # a fake network cannot be converted
    try:
        return UNet2DConditionModel(**config, time_cond_proj_dim=W_DIM).train()
    finally:
        torch.set_default_dtype(before)


def activations(config: dict[str, Any], batch: int, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps between a student's forward and backward pass, its parameters left out.

    Tensors are fake: they have shapes and storages, but no memory. Weights and matmuls in bfloat16, norms in float32.
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
                kept[storage._cdata] = storage  # held, so that its address stays its own
            return value

        size, empty = config["sample_size"], partial(torch.empty, dtype=torch.bfloat16)
        inputs = empty(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
        cond = empty(batch, 77, config["cross_attention_dim"])
        more = {"text_embeds": empty(batch, 1280), "time_ids": empty(batch, 6)}
        with NormsInFloat32(), torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda value: value):
            unet(*inputs, cond, timestep_cond=empty(batch, 256), added_cond_kwargs=more)
        return sum(storage.nbytes() for storage in kept.values())


def shares(student: UNet2DConditionModel, gpus: int) -> tuple[int, int]:
    """Parameters of the first of `gpus` shards, and of the whole."""
    shapes = [p.shape for p in student.parameters()]
    return sum(-(-shape[0] // gpus) * shape[1:].numel() for shape in shapes), sum(shape.numel() for shape in shapes)


def gathered(student: UNet2DConditionModel) -> int:
    """Bytes of blocks in one piece under FSDP2: the root's and two others (the next one is fetched while one runs) in bfloat16;
    the gradients of one, in bfloat16 and, to be reduced, in float32."""
    blocks = [
        sum(p.numel() for p in block.parameters()) for block in student.modules() if isinstance(block, StableDiffusion.blocks)
    ]
    root = sum(p.numel() for p in student.parameters()) - sum(blocks)
    return BFLOAT16 * (root + 2 * max(blocks)) + (BFLOAT16 + FLOAT32) * max(blocks)


def rows(name: str, config: dict[str, Any], batch: int, gpus: int) -> list[dict[str, Any]]:
    with torch.device("meta"):
        student = StableDiffusion({}, config).with_w(UNet2DConditionModel(**config))
    part, every = shares(student, gpus)
    kept = {checkpointing: activations(config, batch, checkpointing=checkpointing) for checkpointing in (False, True)}
    found = []
    for strategy, count in (("ddp", every), ("fsdp", part)):
        for target in (True, False):
            states = {
                "student": FLOAT32 * count, "gradients": FLOAT32 * count, "AdamW": 2 * FLOAT32 * count,
                "target": FLOAT32 * count * target, "teacher": BFLOAT16 * count,
                # DDP's buckets of gradients and autocast's copies of the weights, or what FSDP2 gathers
                "buckets, copies, blocks": (FLOAT32 + BFLOAT16) * every if strategy == "ddp" else gathered(student),
            }  # fmt: skip
            total = sum(states.values())
            found.append({
                "UNet": name, "strategy": f"trainer={strategy}", "target net": "average" if target else "itself (mu = 0)",
                **{key: value / GIB for key, value in states.items()},
                "states": total / GIB, "images": batch, "activations": kept[False] / GIB, "recomputed": kept[True] / GIB,
                "all": (total + kept[False]) / GIB, "all, recomputed": (total + kept[True]) / GIB,
            })  # fmt: skip
    return found


def measure(*, networks: dict[str, dict[str, Any]], batch_sizes: dict[str, int], gpus: int) -> Table:
    """networks: configurations of diffusers' UNet2DConditionModel by name, each at its own `sample_size`; batch_sizes: images a
    GPU, by the same names."""
    configs = {name: {k: v for k, v in config.items() if k != "_target_"} for name, config in networks.items()}
    found = [row for name, config in configs.items() for row in rows(name, config, batch_sizes[name], gpus)]
    note = (
        f"GiB a GPU, of {gpus} that share everything under fsdp; precision bf16-mixed; images of the UNet's own size. An "
        "estimate from shapes, not measured on a GPU. Activations are what autograd keeps of the student's forward pass "
        "(recomputed: with model.gradient_checkpointing=true). On top come the block that is recomputed, the passes without "
        "gradients, the kernels' workspace, the allocator's gaps, the VAE and the text encoder."
    )
    return Table("Memory of training", found, note)
