"""Samplers, from noise to latents. Every sampler is `(denoise, z_T, timesteps, *, process, noise) -> z_0`.

denoise: a denoiser with condition and guidance bound. z_T: `[B, C, H, W]` ~ N(0, I). timesteps: descending integers that start
with the timestep of z_T. noise: `() -> [B, C, H, W]`, fresh standard normals. ODE and ancestral samplers end at the process'
t_min. In VP some noise is left there (sigma_0 = 0.03), as in Stable Diffusion's own schedulers.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lcm.core.consistency import ConsistencyFn, consistency_fn
from lcm.core.denoiser import Denoise, Denoised
from lcm.core.process import FLOOR, Process, per_sample
from lcm.core.solvers import Solver, eps_step, x0_step

Noise = Callable[[], Tensor]


def consistency(
    denoise: Denoise,
    z: Tensor,
    timesteps: list[int],
    *,
    process: Process,
    noise: Noise,
    f: ConsistencyFn = consistency_fn,
) -> Tensor:
    """Sample by multistep consistency sampling (LCM, Algorithm 3). f: the consistency function of the training."""
    x0 = f(denoise, z, _at(timesteps[0], z), process=process)
    for tau in timesteps[1:]:
        z = process.jump(x0, noise(), _at(tau, z))
        x0 = f(denoise, z, _at(tau, z), process=process)
    return x0


def tcd(denoise: Denoise, z: Tensor, timesteps: list[int], *, process: Process, noise: Noise, gamma: float = 0.3) -> Tensor:
    """Sample by the strategic stochastic sampling of TCD (2402.19159, Algorithm 4).

    A step from t to p jumps to `floor((1 - gamma) p)`, counted from the clean end, and adds noise up to p. With gamma = 0 the
    steps are deterministic. With gamma = 1 they add noise to the clean end. The last step adds no noise.
    """
    for t, p in pairwise([*timesteps, process.t_min]):
        end = process.t_min + math.floor((1 - gamma) * (p - process.t_min))
        z = process.jump(*denoise(z, _at(t, z)), _at(end, z))
        if gamma and p != process.t_min:
            z = process.renoise(z, _at(end, z), _at(p, z), noise())
    return z


def ode(
    denoise: Denoise,
    z: Tensor,
    timesteps: list[int],
    *,
    process: Process,
    noise: Noise,
    solver: Solver,
) -> Tensor:
    """Sample by repeated steps of a solver of `lcm.core.solvers`."""
    for t, s in _steps(timesteps, z, process):
        z = solver(denoise, z, t, s, process=process)
    return z


def ddim(denoise: Denoise, z: Tensor, timesteps: list[int], *, process: Process, noise: Noise, eta: float = 0.0) -> Tensor:
    """Sample by DDIM (2010.02502, eq. 12 and 16). eta = 0 solves the ODE, eta = 1 is ancestral sampling."""
    for t, s in _steps(timesteps, z, process):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, z.ndim), process.at(s, z.ndim)
        x0, eps = denoise(z, t)
        variance = (sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        ancestral = alpha_t / alpha_s * sigma_s**2 / sigma_t  # scale of eps at eta = 1: sqrt(sigma_s^2 - variance)
        z = alpha_s * x0 + ((1 - eta**2) * sigma_s**2 + (eta * ancestral) ** 2).sqrt() * eps
        if eta:
            z = z + eta * variance.sqrt() * noise()
    return z


def ddpm(denoise: Denoise, z: Tensor, timesteps: list[int], *, process: Process, noise: Noise) -> Tensor:
    """Sample by DDPM's ancestral sampling (2006.11239, Algorithm 2) on a subsequence of timesteps: DDIM with eta = 1."""
    return ddim(denoise, z, timesteps, process=process, noise=noise, eta=1.0)


def dpm_solver_2m(denoise: Denoise, z: Tensor, timesteps: list[int], *, process: Process, noise: Noise) -> Tensor:
    """Sample by the second-order DPM-Solver (2206.00927) in multistep form: `dpm_solver_pp_2m` with eps in place of x0."""

    def step(denoised: Denoised, eps: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return eps_step(z, denoised.x0, eps, t, s, process)

    return _multistep(denoise, lambda denoised: denoised.eps, step, z, timesteps, process)


def dpm_solver_pp_2m(denoise: Denoise, z: Tensor, timesteps: list[int], *, process: Process, noise: Noise) -> Tensor:
    """Sample by DPM-Solver++(2M) (2211.01095, Algorithm 2): second order with one network call per step."""

    def step(denoised: Denoised, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x0_step(z, x0, t, s, process)

    return _multistep(denoise, lambda denoised: denoised.x0, step, z, timesteps, process)


def _multistep(
    denoise: Denoise,
    prediction: Callable[[Denoised], Tensor],
    step: Callable[..., Tensor],
    z: Tensor,
    timesteps: list[int],
    process: Process,
) -> Tensor:
    """Sample by a linear multistep method, which extrapolates the prediction (x0 or eps) from the last two steps.

    The first step is first order. The last step is first order if there are fewer than 15 steps, or if it ends without noise
    (diffusers' `lower_order_final`).
    """
    previous: tuple[Tensor, Tensor] | None = None  # (prediction, h) of the previous step
    for i, (t, s) in enumerate(_steps(timesteps, z, process)):
        denoised = denoise(z, t)
        current = prediction(denoised)
        h = per_sample(process.half_log_snr(s) - process.half_log_snr(t), z.ndim)
        last = i == len(timesteps) - 1 and (len(timesteps) < 15 or process.t_min < 0)
        value = current if previous is None or last else current + (current - previous[0]) * h / (2 * previous[1])
        previous = (current, h)
        z = step(denoised, value, z, t, s)
    return z


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor, process: Process) -> Denoise:
    """Return a denoiser for inpainting: with any sampler, the latent stays `known` where the mask is 0.

    Where the mask is 0, x0 is the known latent and eps is the noise of z_t on top of it. The sampler moves z_t along (x0, eps)
    to the next time, so the network sees the known part with the noise of each time.
    known: `[B, C, H, W]`. mask: `[B, 1, H, W]`, 0 (known) to 1 (drawn).
    """

    def denoise_masked(z: Tensor, t: Tensor) -> Denoised:
        x0, eps = denoise(z, t)
        alpha, sigma = process.at(t, z.ndim)
        return Denoised(known.lerp(x0, mask), ((z - alpha * known) / sigma.clamp_min(FLOOR)).lerp(eps, mask))

    return denoise_masked


def _steps(timesteps: list[int], z: Tensor, process: Process) -> Iterator[tuple[Tensor, Tensor]]:
    return ((_at(t, z), _at(s, z)) for t, s in pairwise([*timesteps, process.t_min]))


def _at(t: int, z: Tensor) -> Tensor:
    return torch.full((len(z),), t, device=z.device, dtype=torch.int64)
