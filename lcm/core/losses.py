"""Distances d(x, y) of consistency training: elementwise and not averaged, so that a caller can weight samples.

Each is `(x, y) -> [B, C, H, W]`, non-negative, and 0 where x = y.
"""

from torch import Tensor

from lcm.core.numbers import NonNegative, Positive


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared error, the LCM paper's d."""
    return (x - y).square()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the absolute error."""
    return (x - y).abs()


def huber(x: Tensor, y: Tensor, *, c: NonNegative = 0.001) -> Tensor:
    """Return pseudo-Huber's `sqrt((x - y)^2 + c^2) - c` (2310.14189, eq. 8, elementwise as in diffusers' scripts)."""
    if c == 0:  # the root has no gradient at 0
        return l1(x, y)
    return ((x - y).square() + c**2).sqrt() - c


def cauchy(x: Tensor, y: Tensor, *, c: Positive = 0.1) -> Tensor:
    """Return `log(1 + (x - y)^2 / (2 c^2))` (2502.01441), which is robust to outliers of latents."""
    return ((x - y).square() / (2 * c**2)).log1p()
