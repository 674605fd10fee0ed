"""The consistency function: a network made to satisfy f(z, t = 0) = z (LCM, eq. 9; Consistency Models, eq. 5)."""

from collections.abc import Callable

from torch import Tensor

from lcm.core.prediction import Denoised

Denoise = Callable[[Tensor, Tensor], Denoised]


def boundary_scalings(t: Tensor, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip, c_out `[B]` float32 of integer timesteps t `[B]`, in the form every released LCM was trained with.

    `c_skip = sd^2 / ((a t)^2 + sd^2)`, `c_out = a t / sqrt((a t)^2 + sd^2)`: without the extra factor sd of Consistency Models.
    """
    scaled = timestep_scaling * t.float()
    square = scaled**2 + sigma_data**2
    return sigma_data**2 / square, scaled / square.sqrt()


def consistency_fn(denoise: Denoise, z_t: Tensor, t: Tensor) -> Tensor:
    """`f(z_t, t) = c_skip z_t + c_out x0(z_t, t)`, `[B, C, H, W]` float32; c and w are bound in `denoise`."""
    c_skip, c_out = (c.view(-1, *(1,) * (z_t.ndim - 1)) for c in boundary_scalings(t))
    return c_skip * z_t + c_out * denoise(z_t, t).x0
