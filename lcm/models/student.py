"""UNets as the core's networks, and the w-conditioned student made from a teacher."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lcm.core.condition import Condition, SizedText
from lcm.core.guidance import W_DIM, embed_w
from lcm.core.networks import Network
from lcm.errors import UserError


def as_network(unet: UNet2DConditionModel, compiled: Callable[..., Any] | None = None) -> Network:
    """`net(z_t, t, cond, w)` over diffusers' UNet; w is embedded in float32, inputs follow the weights' dtype.

    A UNet without `time_cond_proj_dim` ignores w; Stable Diffusion XL's takes a `SizedText`, and no other. compiled: what is
    called in the UNet's place.
    """
    forward, dim = unet if compiled is None else compiled, unet.config["time_cond_proj_dim"]
    is_xl, width = unet.config["addition_embed_type"] == "text_time", unet.config["cross_attention_dim"]

    def net(z_t: Tensor, t: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
        dtype = next(unet.parameters()).dtype  # unet.dtype walks over all modules
        embedding = None if w is None or dim is None else embed_w(w, dim).to(dtype)
        options: dict[str, Any] = {"timestep_cond": embedding, "return_dict": False}
        if isinstance(cond, SizedText) != is_xl:
            of, other = ("", " not") if is_xl else ("not ", "")
            raise UserError(
                f"the UNet is {of}Stable Diffusion XL's, the text encoders are{other}: set data.codec.pipeline to the pipeline "
                "that is trained"
            )
        if isinstance(cond, SizedText):  # sizes stay integers: bfloat16 has 8 bits for them
            options["added_cond_kwargs"] = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.sizes}
            cond = cond.states
        if cond.shape[-1] != width:
            raise UserError(
                f"the UNet reads texts of width {width}, not {cond.shape[-1]}: set data.codec.pipeline to the pipeline that is "
                "trained, and encode latents with texts by it"
            )
        return forward(z_t.to(dtype), t, cond.to(dtype), **options)[0]

    return net


def make_student(teacher: UNet2DConditionModel, *, zero_init: bool = True) -> UNet2DConditionModel:
    """A copy of the teacher that also takes w; with a zero-initialised projection it starts as the teacher exactly.

    A UNet that is w-conditioned already is copied as it is.
    """
    known = teacher.config["time_cond_proj_dim"]
    student = unet_like(teacher, time_cond_proj_dim=known or W_DIM)
    if known is None and zero_init and student.device.type != "meta":
        nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def frozen_copy(net: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy for averaging: no gradients, evaluation mode. Weights that `net` does not train are shared, not copied."""
    return sharing(net, (p for p in net.parameters() if not p.requires_grad)).eval().requires_grad_(False)


def sharing(net: UNet2DConditionModel, shared: Iterable[nn.Parameter]) -> UNet2DConditionModel:
    """A copy that has `shared` in common with `net`: the same objects, which stay common when either is moved or cast."""
    return copy.deepcopy(net, {id(p): p for p in shared})


def unet_like(net: UNet2DConditionModel, **changes: Any) -> UNet2DConditionModel:
    """A UNet of the same configuration but for `changes`, on the same device, with the weights that both have."""
    # diffusers resets what `_use_default_values` lists, whatever its value; `from_config` passes over keys it does not know.
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    with torch.device("meta"):  # drawing weights to overwrite them takes longer than copying them
        like = UNet2DConditionModel.from_config({**config, **changes})
    if net.device.type == "meta":
        return like
    like = nn.Module.to(like, net.dtype).to_empty(device=net.device)
    missing, unexpected = like.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"time_embedding.cond_proj.weight"}, missing
    if missing:
        like.time_embedding.cond_proj.reset_parameters()
    return like
