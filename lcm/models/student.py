"""UNets as the core's networks, and the w-conditioned student made from a teacher."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lcm.core.guidance import embed_w
from lcm.core.networks import Network


def as_network(unet: UNet2DConditionModel) -> Network:
    """`net(z_t, t, cond, w)` over diffusers' UNet; w is embedded in float32, inputs follow the weights' dtype.

    A UNet without `time_cond_proj_dim` ignores w.
    """

    def net(z_t: Tensor, t: Tensor, cond: Tensor, w: Tensor | None = None) -> Tensor:
        dtype, dim = unet.dtype, unet.config["time_cond_proj_dim"]
        embedding = None if w is None or dim is None else embed_w(w, dim).to(dtype)
        return unet(z_t.to(dtype), t, cond.to(dtype), timestep_cond=embedding, return_dict=False)[0]

    return net


def make_student(teacher: UNet2DConditionModel, *, cond_proj_dim: int = 256, zero_init: bool = True) -> UNet2DConditionModel:
    """A copy of the teacher that also takes w; with a zero-initialised projection it starts as the teacher exactly.

    A UNet that is w-conditioned already is copied as it is.
    """
    config = {**teacher.config, "time_cond_proj_dim": teacher.config["time_cond_proj_dim"] or cond_proj_dim}
    with torch.device(teacher.device):
        student = UNet2DConditionModel.from_config(config).to(teacher.dtype)
    if teacher.device.type == "meta":
        return student
    student.load_state_dict(teacher.state_dict(), strict=False)
    projection = student.time_embedding.cond_proj
    if teacher.config["time_cond_proj_dim"] is None and zero_init:
        nn.init.zeros_(projection.weight)
    return student
