"""Networks as the core calls them, and copies of networks."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lcm.core.denoiser import Condition, Network
from lcm.core.errors import UserError
from lcm.models.families import Family


def as_network(family: Family, net: Any, compiled: Callable[..., Any] | None = None) -> Network:
    """Return `network(z_t, time, cond, w)` over a network of the family. compiled: the function to call in its place."""
    forward = net if compiled is None else compiled
    names = {*family.text, "sizes"} if family.takes_sizes else {*family.text}
    width = net.config[family.width]

    def network(z_t: Tensor, time: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
        if set(cond) != names or cond["states"].shape[-1] != width:
            raise UserError(
                f"the network reads {', '.join(sorted(names))} of width {width}, the text encoders give "
                f"{', '.join(sorted(cond))} of width {cond['states'].shape[-1]}: "
                "set data.codec.pipeline to the pipeline that is trained, and encode latents with text embeddings by it"
            )
        return family.call(net, forward, z_t, time, cond, w)

    return network


def frozen_copy(net: Any) -> Any:
    """Return a copy for averaging: no gradients, evaluation mode. Weights that `net` does not train are shared, not copied."""
    return sharing(net, (p for p in net.parameters() if not p.requires_grad)).eval().requires_grad_(False)


def sharing(net: Any, shared: Iterable[nn.Parameter]) -> Any:
    """Return a copy that shares the given parameters with `net`: the same objects, which stay common when either is moved."""
    return copy.deepcopy(net, {id(p): p for p in shared})
