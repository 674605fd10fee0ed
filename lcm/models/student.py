"""The interface between the core and a family's network, and copies of networks."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from lcm.core.denoiser import Condition, Network
from lcm.core.errors import UserError
from lcm.models.families import Family


def as_network(family: Family, net: Any, compiled: Callable[..., Any] | None = None) -> Network:
    """Return `network(z_t, time, cond, w)` for a network of the family. compiled: the compiled form, to be called instead."""
    forward = net if compiled is None else compiled
    names = {*family.text, "sizes"} if family.takes_sizes else {*family.text}
    width = net.config[family.width]

    def network(z_t: Tensor, time: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
        if set(cond) != names or cond["states"].shape[-1] != width:
            raise UserError(
                f"the network expects {', '.join(sorted(names))} of width {width}, but the text encoders give "
                f"{', '.join(sorted(cond))} of width {cond['states'].shape[-1]}: set data.codec.pipeline to the trained "
                "pipeline, and encode latents and text embeddings with it"
            )
        return family.call(net, forward, z_t, time, cond, w)

    return network


def frozen_copy(net: Any) -> Any:
    """Return a copy for an average, in evaluation mode and without gradients. Frozen weights are shared, not copied."""
    return copy_sharing(net, (p for p in net.parameters() if not p.requires_grad)).eval().requires_grad_(False)


def copy_sharing(net: Any, shared: Iterable[nn.Parameter]) -> Any:
    """Return a copy of `net` with the same parameter objects for `shared`, also after `.to(device)`.

    A layer with shared parameters only is the same object, too: a quantised layer has state besides its parameters.
    """
    memo: dict[int, Any] = {id(p): p for p in shared}
    for layer in net.modules():
        parameters = list(layer.parameters())
        if parameters and next(layer.children(), None) is None and all(id(p) in memo for p in parameters):
            memo[id(layer)] = layer
    return copy.deepcopy(net, memo)


def quantize_linears(net: Any, quantization: Callable[[nn.Linear], nn.Module] | None) -> Any:
    """Replace every linear layer of a network by `quantization(layer)`, in place, and return the network. None: no change."""
    if quantization is not None:
        for name, layer in list(net.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(net.get_submodule(parent), child, quantization(layer))
    return net
