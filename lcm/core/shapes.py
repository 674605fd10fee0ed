"""How a value for each sample meets what there is of a sample."""

from torch import Tensor


def per_sample(values: Tensor, ndim: int) -> Tensor:
    """`[B]` values as `[B, 1, ...]`, to broadcast against a tensor of `ndim` axes."""
    return values.view(-1, *(1,) * (ndim - 1))
