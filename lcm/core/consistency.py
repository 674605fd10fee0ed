"""The consistency function: a network made to satisfy f(z, t_min) = z (LCM, eq. 9; Consistency Models, eq. 5)."""

from collections.abc import Callable

from torch import Tensor

from lcm.core.denoiser import Denoise
from lcm.core.process import FLOOR, Process, per_sample

ConsistencyFn = Callable[..., Tensor]  # (denoise, z_t [B, C, H, W], t [B], *, process) -> [B, C, H, W] float32


def boundary_scalings(t: Tensor, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return c_skip, c_out `[B]` float32 at timesteps t `[B]`, as used by every released LCM.

    `c_skip = sd^2 / ((a t)^2 + sd^2)`, `c_out = a t / sqrt((a t)^2 + sd^2)`, with sd = sigma_data and a = timestep_scaling.
    Consistency Models multiply c_out by sd.
    """
    scaled = timestep_scaling * t.float()
    square = scaled**2 + sigma_data**2
    return sigma_data**2 / square, scaled / square.sqrt()


def consistency_fn(denoise: Denoise, z_t: Tensor, t: Tensor, *, process: Process) -> Tensor:
    """Return LCM's `f(z_t, t) = c_skip z_t + c_out x0(z_t, t)`, `[B, C, H, W]` float32 (LCM, eq. 9).

    The scalings enforce the boundary condition in VP, whose clean end has noise. A flow ends at sigma = 0, where
    x0(z, t) = z holds without scalings. denoise: with the condition and w bound.
    """
    x0 = denoise(z_t, t).x0
    if process.t_min < 0:
        return x0
    c_skip, c_out = (per_sample(c, z_t.ndim) for c in boundary_scalings(t))
    return c_skip * z_t + c_out * x0


def cm_scalings(sigma: Tensor, sigma_min: Tensor | float, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return c_skip, c_out of Consistency Models (2303.01469, appendix C) at noise `sigma` of `x = z_0 + sigma eps`.

    `c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2)`, `c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2)`, sd = sigma_data.
    """
    gap = sigma - sigma_min
    return sigma_data**2 / (gap**2 + sigma_data**2), sigma_data * gap / (sigma**2 + sigma_data**2).sqrt()


def cm_consistency_fn(denoise: Denoise, z_t: Tensor, t: Tensor, *, process: Process, sigma_data: float = 1.0) -> Tensor:
    """Return `f(x, sigma) = c_skip x + c_out F(x, sigma)` of Consistency Models, `[B, C, H, W]`, for a network of any process.

    `x = z_t / alpha_t` has noise `sigma = sigma_t / alpha_t`. F is the network's x0 in EDM's preconditioning, without t_min.
    A diffusion model is therefore a valid initialisation. sigma_data: the standard deviation of the latents. In a flow f is
    x0 itself.
    """
    if process.t_min < 0:
        return denoise(z_t, t).x0
    alpha, sigma_t = process.at(t, z_t.ndim)
    x, sigma = z_t / alpha, sigma_t / alpha
    clean = t[:1] * 0 + process.t_min
    sigma_min = per_sample(process.sigma(clean) / process.alpha(clean), z_t.ndim)
    edm_skip, edm_out = cm_scalings(sigma, 0.0, sigma_data=sigma_data)
    c_skip, c_out = cm_scalings(sigma, sigma_min, sigma_data=sigma_data)
    return c_skip * x + c_out * (denoise(z_t, t).x0 - edm_skip * x) / edm_out.clamp_min(FLOOR)
