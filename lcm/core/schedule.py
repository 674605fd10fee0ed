"""Noise schedules `z_t = alpha_t z_0 + sigma_t eps` over integer timesteps 0 .. T-1 (alpha^2 + sigma^2 = 1)."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lcm.core import prediction
from lcm.core.shapes import per_sample
from lcm.errors import UserError

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


class NoiseSchedule(nn.Module):
    """Tables of alpha and sigma, built in float64, and what the network is taken to predict.

    The arguments are the keys of diffusers' `scheduler_config.json`; `squaredcos_cap_v2` is the cosine schedule.
    prediction_type: "epsilon", "v_prediction" or "sample".
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(
        self,
        *,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        prediction.check(prediction_type)
        self.config: dict[str, Any] = {
            "beta_schedule": beta_schedule,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "num_train_timesteps": num_train_timesteps,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
            "prediction_type": prediction_type,
        }
        self.prediction_type, self.num_timesteps = prediction_type, num_train_timesteps
        alpha_bar = (1 - betas(beta_schedule, beta_start, beta_end, num_train_timesteps)).cumprod(0)
        if rescale_betas_zero_snr:
            alpha_bar = zero_terminal_snr(alpha_bar)
        alpha_bar = alpha_bar.clamp_min(prediction.FLOOR**2)  # alpha = 0 would make lambda infinite and eps say nothing of x0
        self.register_buffer("alpha", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alpha_bar).sqrt().float(), persistent=False)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """From the content of a `scheduler_config.json`; keys that do not shape the noise are ignored.

        Raises UserError for noise of another kind than here, and for betas left to the defaults, which differ among diffusers'
        classes; all of them default to 1000 timesteps and to "epsilon".
        """
        kind = str(config.get("_class_name"))
        if kind.startswith(("EDM", "FlowMatch")):  # they may still carry the betas of the scheduler they were made from
            raise UserError(f"the scheduler {kind} has no betas: give a model trained on Stable Diffusion's kind of noise")
        if config.get("trained_betas") is not None:
            raise UserError("the scheduler's trained_betas are not read: give a model whose betas are those of a beta_schedule")
        if silent := [key for key in ("beta_schedule", "beta_start", "beta_end") if config.get(key) is None]:
            raise UserError(
                f"the scheduler's config does not say {', '.join(silent)}: write into scheduler_config.json what the model was "
                "trained with (Stable Diffusion: scaled_linear, 0.00085, 0.012)"
            )
        return cls(**{key: config[key] for key in inspect.signature(cls).parameters if key in config})

    def at(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t `[B]` int64, shaped `[B, 1, ...]` to broadcast against a tensor of `ndim` axes."""
        return per_sample(self.alpha[t], ndim), per_sample(self.sigma[t], ndim)

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t), `[B]`, the axis of the DPM-Solver papers."""
        return self.alpha[t].log() - self.sigma[t].log()

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, `[B]`."""
        return (2 * self.half_log_snr(t)).exp()

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`z_t = alpha_t z0 + sigma_t eps`; z0, eps: `[B, ...]`, t: `[B]` int64."""
        alpha, sigma = self.at(t, z0.ndim)
        return alpha * z0 + sigma * eps

    def denoised(self, output: Tensor, z_t: Tensor, t: Tensor) -> prediction.Denoised:
        """The network's output at (z_t, t), read as (x0, eps)."""
        alpha, sigma = self.at(t, z_t.ndim)
        return prediction.to_denoised(output, z_t, alpha, sigma, self.prediction_type)

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output for `add_noise(z0, eps, t)`."""
        alpha, sigma = self.at(t, z0.ndim)
        return prediction.target(z0, eps, alpha, sigma, self.prediction_type)


def betas(kind: str, start: float, end: float, steps: int) -> Tensor:
    """`[steps]` float64 noise increments beta_t."""
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
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts where it did (2305.08891, Algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
