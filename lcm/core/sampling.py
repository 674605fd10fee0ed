"""From noise to latents. Every sampler is `(denoise, z_T, timesteps, *, schedule, noise) -> z_0`.

denoise: a network with caption and guidance bound; z_T `[B, C, H, W]` ~ N(0, I); timesteps: descending integers, the first of
them z_T's; noise: `() -> [B, C, H, W]`, fresh standard normals. ODE and ancestral samplers end at timestep 0, where a trace of
noise (sigma_0 = 0.03) is left, as in Stable Diffusion's own schedulers.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lcm.core.consistency import ConsistencyFn, consistency_fn
from lcm.core.prediction import Denoise
from lcm.core.schedule import NoiseSchedule
from lcm.core.shapes import per_sample
from lcm.core.solvers import Solver, eps_step, x0_step

Noise = Callable[[], Tensor]


def consistency(
    denoise: Denoise,
    z: Tensor,
    timesteps: list[int],
    *,
    schedule: NoiseSchedule,
    noise: Noise,
    f: ConsistencyFn = consistency_fn,
) -> Tensor:
    """Multistep consistency sampling (LCM, Algorithm 3); one step draws no second noise. f: as the model was trained."""
    x0 = f(denoise, z, _at(timesteps[0], z))
    for tau in timesteps[1:]:
        z = schedule.add_noise(x0, noise(), _at(tau, z))
        x0 = f(denoise, z, _at(tau, z))
    return x0


def ode(
    denoise: Denoise,
    z: Tensor,
    timesteps: list[int],
    *,
    schedule: NoiseSchedule,
    noise: Noise,
    solver: Solver,
) -> Tensor:
    """Any solver of `lcm.core.solvers`, step after step."""
    for t, s in _steps(timesteps, z):
        z = solver(denoise, z, t, s, schedule=schedule)
    return z


def ddim(
    denoise: Denoise, z: Tensor, timesteps: list[int], *, schedule: NoiseSchedule, noise: Noise, eta: float = 0.0
) -> Tensor:
    """DDIM (2010.02502, eq. 12 and 16): eta = 0 is the ODE, eta = 1 is ancestral sampling."""
    for t, s in _steps(timesteps, z):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, z.ndim), schedule.at(s, z.ndim)
        x0, eps = denoise(z, t)
        variance = (sigma_s / sigma_t) ** 2 * (1 - (alpha_t / alpha_s) ** 2)
        z = alpha_s * x0 + (sigma_s**2 - eta**2 * variance).sqrt() * eps
        if eta:
            z = z + eta * variance.sqrt() * noise()
    return z


def ddpm(denoise: Denoise, z: Tensor, timesteps: list[int], *, schedule: NoiseSchedule, noise: Noise) -> Tensor:
    """DDPM's ancestral sampling (2006.11239, Algorithm 2) on a subsequence of timesteps: DDIM with eta = 1."""
    return ddim(denoise, z, timesteps, schedule=schedule, noise=noise, eta=1.0)


def dpm_solver_2m(denoise: Denoise, z: Tensor, timesteps: list[int], *, schedule: NoiseSchedule, noise: Noise) -> Tensor:
    """DPM-Solver of second order (2206.00927) in multistep form: as `dpm_solver_pp_2m`, with eps in the place of x0."""
    return _multistep(lambda z, t: denoise(z, t).eps, eps_step, z, timesteps, schedule)


def dpm_solver_pp_2m(denoise: Denoise, z: Tensor, timesteps: list[int], *, schedule: NoiseSchedule, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (2211.01095, Algorithm 2): second order at one network call a step."""
    return _multistep(lambda z, t: denoise(z, t).x0, x0_step, z, timesteps, schedule)


def _multistep(
    read: Callable[[Tensor, Tensor], Tensor],
    step: Callable[..., Tensor],
    z: Tensor,
    timesteps: list[int],
    schedule: NoiseSchedule,
) -> Tensor:
    """`read` is what the step takes for constant; here it is continued along the line through the last two of it.

    The first step is of order one, and, as in diffusers, the last of fewer than 15: a long way to extrapolate to the clean end.
    """
    previous: tuple[Tensor, Tensor] | None = None  # (what was read, h) of the step before
    for i, (t, s) in enumerate(_steps(timesteps, z)):
        now = read(z, t)
        h = per_sample(schedule.half_log_snr(s) - schedule.half_log_snr(t), z.ndim)
        last = len(timesteps) < 15 and i == len(timesteps) - 1
        slope = now if previous is None or last else now + (now - previous[0]) * h / (2 * previous[1])
        previous = (now, h)
        z = step(z, slope, t, s, schedule)
    return z


def _steps(timesteps: list[int], z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((_at(t, z), _at(s, z)) for t, s in pairwise([*timesteps, 0]))


def _at(t: int, z: Tensor) -> Tensor:
    return torch.full((len(z),), t, device=z.device, dtype=torch.int64)
