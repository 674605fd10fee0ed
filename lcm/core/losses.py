"""Distances d(x, y) of consistency training: elementwise and unreduced, so that a caller can weight samples.

All are `(x, y) -> [B, C, H, W]`, non-negative, 0 where x = y.
"""

from torch import Tensor

from lcm.core.numbers import NonNegative, Positive


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Squared error, the LCM paper's d."""
    return (x - y).square()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Absolute error."""
    return (x - y).abs()


def huber(x: Tensor, y: Tensor, *, c: NonNegative = 0.001) -> Tensor:
    """Pseudo-Huber `sqrt((x - y)^2 + c^2) - c` (2310.14189, eq. 8, elementwise as in diffusers' scripts)."""
    if c == 0:  # the root has no gradient at 0
        return l1(x, y)
    return ((x - y).square() + c**2).sqrt() - c


def cauchy(x: Tensor, y: Tensor, *, c: Positive = 0.1) -> Tensor:
    """`log(1 + (x - y)^2 / (2 c^2))` (2502.01441): flat for the outliers that latents have."""
    return ((x - y).square() / (2 * c**2)).log1p()
