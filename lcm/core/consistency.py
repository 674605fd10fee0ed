"""The consistency function: a network made to satisfy f(z, t_min) = z (LCM, eq. 9; Consistency Models, eq. 5)."""

from collections.abc import Callable

from torch import Tensor

from lcm.core.prediction import Denoise
from lcm.core.schedule import NoiseSchedule
from lcm.core.shapes import per_sample

ConsistencyFn = Callable[[Denoise, Tensor, Tensor], Tensor]  # (denoise, z_t [B, C, H, W], t [B] int64) -> [B, C, H, W] float32


def boundary_scalings(t: Tensor, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip, c_out `[B]` float32 of integer timesteps t `[B]`, in the form every released LCM was trained with.

    `c_skip = sd^2 / ((a t)^2 + sd^2)`, `c_out = a t / sqrt((a t)^2 + sd^2)`: without the extra factor sd of Consistency Models.
    """
    scaled = timestep_scaling * t.float()
    square = scaled**2 + sigma_data**2
    return sigma_data**2 / square, scaled / square.sqrt()


def consistency_fn(denoise: Denoise, z_t: Tensor, t: Tensor) -> Tensor:
    """`f(z_t, t) = c_skip z_t + c_out x0(z_t, t)`, `[B, C, H, W]` float32; c and w are bound in `denoise`."""
    c_skip, c_out = (per_sample(c, z_t.ndim) for c in boundary_scalings(t))
    return c_skip * z_t + c_out * denoise(z_t, t).x0


def cm_scalings(sigma: Tensor, sigma_min: Tensor | float, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    """c_skip, c_out of Consistency Models (2303.01469, appendix C) at noise `sigma` of the VE process `x = z_0 + sigma eps`.

    `c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2)`, `c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2)`.
    """
    gap = sigma - sigma_min
    return sigma_data**2 / (gap**2 + sigma_data**2), sigma_data * gap / (sigma**2 + sigma_data**2).sqrt()


def cm_consistency_fn(denoise: Denoise, z_t: Tensor, t: Tensor, *, schedule: NoiseSchedule, sigma_data: float = 1.0) -> Tensor:
    """`f(x, sigma) = c_skip x + c_out F(x, sigma)` of Consistency Models, for a network of a VP schedule.

    `x = z_t / alpha_t` has noise `sigma = sigma_t / alpha_t`, t_min is timestep 0. F is what the network's x0 means in that
    form without t_min (EDM's preconditioning): the network of a diffusion model is then a consistency model to start from.
    sigma_data: the latents' standard deviation, which Stable Diffusion scales to 1.
    """
    alpha, sigma_t = schedule.at(t, z_t.ndim)
    x, sigma, sigma_min = z_t / alpha, sigma_t / alpha, schedule.sigma[0] / schedule.alpha[0]
    edm_skip, edm_out = cm_scalings(sigma, 0.0, sigma_data=sigma_data)
    c_skip, c_out = cm_scalings(sigma, sigma_min, sigma_data=sigma_data)
    return c_skip * x + c_out * (denoise(z_t, t).x0 - edm_skip * x) / edm_out
