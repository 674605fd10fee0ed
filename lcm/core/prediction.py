"""What a network predicts: eps, v or x0 of `z_t = alpha x0 + sigma eps`, each convertible to the others given (z_t, t)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcm.errors import UserError

FLOOR = 2.0**-12  # the least alpha or sigma that is divided by; diffusers patches zero-SNR alpha^2 to 2^-24 alike
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Denoised(NamedTuple):
    """Clean latent and noise that together make up z_t, each `[B, C, H, W]`."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, Tensor], Denoised]  # (z_t [B, C, H, W], t [B] int64): a network, all else bound


def check(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"unknown prediction_type {prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")


def to_denoised(output: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Denoised:
    """Read a network's output; alpha, sigma broadcast against z_t. Divisions by an alpha near 0 are guarded."""
    if prediction_type == "epsilon":
        return Denoised(x0_of_eps(output, z_t, alpha, sigma), output)
    if prediction_type == "v_prediction":  # v = alpha eps - sigma x0 (2202.00512, appendix D)
        return Denoised(alpha * z_t - sigma * output, sigma * z_t + alpha * output)
    return Denoised(output, eps_of_x0(output, z_t, alpha, sigma))


def x0_of_eps(eps: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (z_t - sigma * eps) / alpha.clamp_min(FLOOR)


def eps_of_x0(x0: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (z_t - alpha * x0) / sigma.clamp_min(FLOOR)


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The output that a perfect network would give."""
    if prediction_type == "epsilon":
        return eps
    return alpha * eps - sigma * x0 if prediction_type == "v_prediction" else x0
