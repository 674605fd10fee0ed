"""One step of the probability-flow ODE from t to s < t: the paper's Psi, and the steps that ODE samplers repeat.

Every solver is `(denoise, z_t, t, s, *, process) -> z_s` with z `[B, C, H, W]`, t and s `[B]` int64. `denoise` is a network
with condition, guidance and prediction type bound, so a solver never sees w. lambda = log(alpha / sigma), h = lambda_s -
lambda_t > 0. Second-order solvers call `denoise` twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lcm.core.denoiser import Denoise
from lcm.core.process import FLOOR, Process, per_sample

Solver = Callable[..., Tensor]


def ddim(denoise: Denoise, z_t: Tensor, t: Tensor, s: Tensor, *, process: Process) -> Tensor:
    """Return z_s by DDIM with eta = 0 (2010.02502, eq. 12), `alpha_s x0 + sigma_s eps`: the paper's default Psi.

    DDIM equals DPM-Solver-1 (2206.00927, eq. 3.7), first-order DPM-Solver++ (2211.01095, eq. 9) and Euler's method on
    `d(z/alpha) = eps d(sigma/alpha)`, as in k-diffusion and EulerDiscreteScheduler. In a flow it is Euler's method, too.
    """
    return process.jump(*denoise(z_t, t), s)


def dpm_solver_2(denoise: Denoise, z_t: Tensor, t: Tensor, s: Tensor, *, process: Process) -> Tensor:
    """Return z_s by single-step DPM-Solver-2 (2206.00927, Algorithm 4), r1 at the timestep nearest lambda's midpoint."""
    m, r = midpoint(t, s, process)
    x0_t, eps_t = denoise(z_t, t)
    eps_m = eps_at(denoise, eps_step(z_t, x0_t, eps_t, t, m, process), m, process, eps_t)
    return eps_step(z_t, x0_t, eps_t + (eps_m - eps_t) / (2 * per_sample(r, z_t.ndim)), t, s, process)


def dpm_solver_pp_2(denoise: Denoise, z_t: Tensor, t: Tensor, s: Tensor, *, process: Process) -> Tensor:
    """Return z_s by DPM-Solver++(2S) (2211.01095, Algorithm 1), with the midpoint of `dpm_solver_2`."""
    m, r = midpoint(t, s, process)
    x0_t = denoise(z_t, t).x0
    x0_m = denoise(x0_step(z_t, x0_t, t, m, process), m).x0
    return x0_step(z_t, x0_t + (x0_m - x0_t) / (2 * per_sample(r, z_t.ndim)), t, s, process)


def heun(denoise: Denoise, z_t: Tensor, t: Tensor, s: Tensor, *, process: Process) -> Tensor:
    """Return z_s by Heun's method on `d(z/alpha) = eps d(sigma/alpha)` (2206.00364, Algorithm 1): the mean slope of both ends.

    A step to the clean end of a flow (s = t_min) is first order, as in Algorithm 1. A step from pure noise is first order, too
    (t = T - 1 of a flow or of zero terminal SNR). There sigma / alpha is infinite.
    """
    x0_t, eps_t = denoise(z_t, t)
    eps_s = eps_at(denoise, eps_step(z_t, x0_t, eps_t, t, s, process), s, process, eps_t)
    return eps_step(z_t, x0_t, (eps_t + eps_s) / 2, t, s, process)


def midpoint(t: Tensor, s: Tensor, process: Process) -> tuple[Tensor, Tensor]:
    """Return the timestep m nearest the middle of (lambda_t, lambda_s), and r = (lambda_m - lambda_t) / h: `[B]` each.

    Neighbouring t and s have no timestep between them. Then m = s and r = 1, which averages the slopes of both ends.
    """
    lambdas = process.half_log_snr(torch.arange(process.num_timesteps, device=t.device))
    lambda_t, lambda_s = process.half_log_snr(t), process.half_log_snr(s)
    m = (lambdas[None] - (lambda_t + lambda_s)[:, None] / 2).abs().argmin(dim=1)
    m = torch.maximum(torch.minimum(m, t - 1), s)
    r = (process.half_log_snr(m) - lambda_t) / (lambda_s - lambda_t)
    return m, torch.where(t > s, r, 1.0)  # r is 0 / 0 in a step of length 0


def eps_at(denoise: Denoise, z: Tensor, t: Tensor, process: Process, fallback: Tensor) -> Tensor:
    """Return the predicted noise in z, or `fallback` at timesteps without noise (a flow, t = t_min)."""
    sigma = per_sample(process.sigma(t), z.ndim)
    return torch.where(sigma > 0, denoise(z, t).eps, fallback)


def eps_step(z_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, process: Process) -> Tensor:
    """Return z_s, the exact solution of the ODE for a constant eps. x0: the prediction at z_t, for pure noise (alpha_t = 0)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, z_t.ndim), process.at(s, z_t.ndim)
    ratio = alpha_s / alpha_t.clamp_min(FLOOR)
    return torch.where(alpha_t > FLOOR, ratio * z_t + (sigma_s - ratio * sigma_t) * eps, alpha_s * x0 + sigma_s * eps)


def x0_step(z_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, process: Process) -> Tensor:
    """Return z_s, the exact solution of the ODE for a constant x0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, z_t.ndim), process.at(s, z_t.ndim)
    ratio = sigma_s / sigma_t.clamp_min(FLOOR)
    return ratio * z_t + (alpha_s - ratio * alpha_t) * x0
