"""Processes `z_t = alpha(t) z_0 + sigma(t) eps`: variance preserving (VP) and rectified flow.

Time t counts timesteps. Integers 0 .. T - 1 are the noise levels of the discrete schedule; a float t lies between two levels.
alpha and sigma are differentiable in a float t. Nothing here assumes `alpha^2 + sigma^2 = 1`.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lcm.core.errors import UserError

FLOOR = 2.0**-12  # smallest divisor for alpha and sigma; diffusers' bound for a zero-SNR alpha^2 is 2^-24, too
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def per_sample(values: Tensor, ndim: int) -> Tensor:
    """Reshape `[B]` to `[B, 1, ...]`, which broadcasts against a tensor with `ndim` axes."""
    return values.view(-1, *(1,) * (ndim - 1))


class Process(nn.Module):
    """The interface of a process. Subclasses define `alpha`, `sigma`, `timestep_at` and `network_time`.

    num_timesteps: T. t_min: the time of the clean end. config: the arguments that rebuild the process.
    """

    num_timesteps: int
    t_min: int
    config: dict[str, Any]

    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal scale, `[B]` float32, at t `[B]` (int64 or float)."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise scale, `[B]` float32, at t `[B]` (int64 or float)."""
        raise NotImplementedError

    def squared_norm(self, t: Tensor) -> Tensor:
        """Return `alpha^2 + sigma^2`, `[B]`: exactly 1 in VP."""
        return self.alpha(t) ** 2 + self.sigma(t) ** 2

    def timestep_at(self, half_log_snr: Tensor) -> Tensor:
        """Return the float time `[B]` at which `log(alpha / sigma)` has the given values `[B]`."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """Return the time `[B]` as the pretrained network expects it."""
        raise NotImplementedError

    def at(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at t `[B]`, shaped `[B, 1, ...]` to broadcast against a tensor with `ndim` axes."""
        return per_sample(self.alpha(t), ndim), per_sample(self.sigma(t), ndim)

    def half_log_snr(self, t: Tensor) -> Tensor:
        """Return lambda = log(alpha / sigma), `[B]`: the time axis of the DPM-Solver papers."""
        return self.alpha(t).clamp_min(FLOOR).log() - self.sigma(t).clamp_min(FLOOR).log()

    def snr(self, t: Tensor) -> Tensor:
        """Return alpha^2 / sigma^2, `[B]`."""
        return (2 * self.half_log_snr(t)).exp()

    def jump(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return `alpha(t) x0 + sigma(t) eps`; x0, eps: `[B, ...]`, t: `[B]`.

        With data and fresh noise this draws z_t. With a network's (x0, eps) it is one DDIM step (Euler's step in a flow) to t.
        """
        alpha, sigma = self.at(t, x0.ndim)
        return alpha * x0 + sigma * eps

    def renoise(self, z_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return z_t ~ q(z_t | z_s) for s <= t, `[B]` each.

        This is `r z_s + sqrt(sigma_t^2 - (r sigma_s)^2) noise` with r = alpha_t / alpha_s.
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.at(s, z_s.ndim), self.at(t, z_s.ndim)
        ratio = alpha_t / alpha_s.clamp_min(FLOOR)
        return ratio * z_s + (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt() * noise


class VP(Process):
    """The variance-preserving process of DDPM and Stable Diffusion: float32 tables of alpha and sigma, built in float64.

    The arguments are keys of diffusers' `scheduler_config.json`; `squaredcos_cap_v2` is the cosine schedule. alpha and sigma
    are linear between two timesteps. The clean end is timestep 0, which has some noise (Stable Diffusion: sigma = 0.03).
    """

    t_min = 0
    alphas: Tensor
    sigmas: Tensor

    def __init__(
        self,
        *,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        self.config = {
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "num_train_timesteps": num_train_timesteps,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        self.num_timesteps = num_train_timesteps
        alpha_bar = (1 - betas(beta_schedule, beta_start, beta_end, num_train_timesteps)).cumprod(0)
        if rescale_betas_zero_snr:
            alpha_bar = zero_terminal_snr(alpha_bar)
        alpha_bar = alpha_bar.clamp_min(FLOOR**2)  # alpha = 0 makes lambda infinite
        self.register_buffer("alphas", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1 - alpha_bar).sqrt().float(), persistent=False)

    def alpha(self, t: Tensor) -> Tensor:
        return interpolate(self.alphas, t)

    def sigma(self, t: Tensor) -> Tensor:
        return interpolate(self.sigmas, t)

    def squared_norm(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=self.alphas.dtype)

    def timestep_at(self, half_log_snr: Tensor) -> Tensor:
        lambdas = self.alphas.log() - self.sigmas.log()  # descending
        right = torch.searchsorted(-lambdas, -half_log_snr.contiguous()).clamp(1, self.num_timesteps - 1)
        (alpha, sigma), ratio = (table[right - 1] for table in (self.alphas, self.sigmas)), (-half_log_snr).exp()
        # Between two timesteps the tables are linear: (sigma + fraction d_sigma) / (alpha + fraction d_alpha) = ratio.
        fraction = (ratio * alpha - sigma) / (self.sigmas[right] - sigma - ratio * (self.alphas[right] - alpha))
        return right - 1 + fraction.clamp(0, 1)

    def network_time(self, t: Tensor) -> Tensor:
        return t


class Flow(Process):
    """Rectified flow of SD3 and Sana: `alpha = 1 - q`, `sigma = q` with q in [0, 1] (2209.03003).

    Timestep t has `g = (t + 1) / T` and `q = shift g / (1 + (shift - 1) g)`, as diffusers' FlowMatchEulerDiscreteScheduler. The
    clean end is t = -1, where q = 0. The network's time is 1000 q.
    """

    t_min = -1

    def __init__(self, *, shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        super().__init__()
        if shift <= 0:
            raise UserError(f"a flow's shift={shift} is not above 0: set 1, for example")
        self.config = {"shift": shift, "num_train_timesteps": num_train_timesteps}
        self.num_timesteps, self.shift = num_train_timesteps, shift

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        g = (t.float() + 1) / self.num_timesteps
        return self.shift * g / (1 + (self.shift - 1) * g)

    def timestep_at(self, half_log_snr: Tensor) -> Tensor:
        q = torch.sigmoid(-half_log_snr)
        g = q / (self.shift - (self.shift - 1) * q)
        return g * self.num_timesteps - 1

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * self.sigma(t)


def process_of(config: dict[str, Any]) -> Process:
    """Build the process from the content of a `scheduler_config.json`. Keys that do not affect the noise are ignored.

    Raises UserError for processes other than VP and flow. Missing betas raise it, too: their defaults differ among diffusers'
    classes.
    """
    name = str(config.get("_class_name"))
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting"):
            raise UserError(
                f"the scheduler {name} shifts its timesteps by the image size, which is not supported: set a fixed shift"
            )
        if config.get("use_flow_sigmas"):  # Sana's DPM-Solver, whose betas have no effect
            config = {**config, "shift": config.get("flow_shift", 1.0)}
        return Flow(**arguments(Flow, config))
    if name.startswith(("EDM", "SCM", "FlowMap")):
        raise UserError(f"the scheduler {name} is not supported: use a model with betas (VP) or with flow matching")
    if config.get("trained_betas") is not None:
        raise UserError("the scheduler's trained_betas are not supported: use a model whose betas follow a beta_schedule")
    if missing := [key for key in ("beta_schedule", "beta_start", "beta_end") if config.get(key) is None]:
        raise UserError(
            f"the scheduler's config lacks {', '.join(missing)}: add the values of the model's training to "
            "scheduler_config.json (Stable Diffusion: scaled_linear, 0.00085, 0.012)"
        )
    return VP(**arguments(VP, config))


def arguments(kind: type[Process], config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `config` that are arguments of the class `kind`."""
    return {key: config[key] for key in inspect.signature(kind).parameters if key in config}


def interpolate(table: Tensor, t: Tensor) -> Tensor:
    """Return the table's values at t `[B]`, linearly interpolated between integers."""
    if not t.is_floating_point():
        return table[t]
    low = t.detach().floor().long().clamp(0, len(table) - 2)
    return torch.lerp(table[low], table[low + 1], t - low)


def betas(kind: str, start: float, end: float, steps: int) -> Tensor:
    """Return the noise increments beta_t, `[steps]` float64. kind: a beta_schedule. Raises UserError for an unknown one."""
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "squaredcos_cap_v2":  # Improved DDPM (2102.09672), eq. 17
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise UserError(f"unknown beta_schedule {kind!r}: use one of {', '.join(BETA_SCHEDULES)}")


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Return alpha_bar `[T]` that ends at 0: its root is shifted and scaled, its start unchanged (2305.08891, Algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
