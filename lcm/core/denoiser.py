"""A denoiser: a network with its process and its output type, which predicts the clean latent and the noise of z_t."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcm.core.errors import UserError
from lcm.core.guidance import guide
from lcm.core.process import FLOOR, Process, per_sample

# Conditioning inputs by name: "states" [B, L, D] (text embeddings) and, depending on the family, "mask" [B, L],
# "pooled" [B, P] and "sizes" [B, 6] int64. An unconditional condition may have one row for all samples.
Condition = Mapping[str, Tensor]
Network = Callable[..., Tensor]  # net(z_t [B, C, H, W], time [B], cond: Condition, w [B] or None) -> [B, C, H, W]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Denoised(NamedTuple):
    """The clean latent and the noise of z_t = alpha x0 + sigma eps, each `[B, C, H, W]` float32."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, Tensor], Denoised]  # (z_t [B, C, H, W], t [B]): a denoiser with its condition and w bound


@dataclass(frozen=True)
class Denoiser:
    """A network, the process of its inputs, and the meaning of its output.

    prediction_type: "epsilon", "v_prediction" (v = alpha eps - sigma x0), "sample" (x0) or "flow_prediction" (u = eps - x0).
    """

    net: Network
    process: Process
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(f"unknown prediction_type {self.prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")

    def __call__(self, z_t: Tensor, t: Tensor, cond: Condition, w: Tensor | None = None) -> Denoised:
        """Predict (x0, eps). z_t: `[B, C, H, W]`. t: `[B]` timesteps. w: `[B]`, for networks that take the guidance weight."""
        return self.read(self.output(z_t, t, cond, w), z_t, t)

    def output(self, z_t: Tensor, t: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
        """Return the network's output, `[B, C, H, W]` float32."""
        return self.net(z_t, self.process.network_time(t), cond, w).float()

    def read(self, output: Tensor, z_t: Tensor, t: Tensor) -> Denoised:
        """Solve `z_t = alpha x0 + sigma eps`, `output = a x0 + b eps` for (x0, eps)."""
        alpha, sigma = self.process.at(t, z_t.ndim)
        if self.prediction_type == "epsilon":
            return Denoised((z_t - sigma * output) / alpha.clamp_min(FLOOR), output)
        if self.prediction_type == "sample":
            x0 = torch.where(sigma > 0, output, z_t / alpha.clamp_min(FLOOR))  # at a flow's clean end x0 is z_t
            return Denoised(x0, (z_t - alpha * x0) / sigma.clamp_min(FLOOR))
        a, b = coefficients(self.prediction_type, alpha, sigma)
        flow = self.prediction_type == "flow_prediction"
        determinant = alpha + sigma if flow else per_sample(self.process.squared_norm(t), z_t.ndim)  # alpha b - sigma a
        return Denoised((b * z_t - sigma * output) / determinant, (alpha * output - a * z_t) / determinant)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the output that a perfect network gives at `z_t = alpha x0 + sigma eps`."""
        a, b = coefficients(self.prediction_type, *self.process.at(t, x0.ndim))
        return a * x0 + b * eps

    def bound(self, cond: Condition, w: Tensor | None = None) -> Denoise:
        """Bind the condition and w. Each call makes one network call."""
        return lambda z, t: self(z, t, cond, w)

    def guided(self, cond: Condition, uncond: Condition, w: Tensor) -> Denoise:
        """Bind classifier-free guidance. Each call makes one network call of 2B samples.

        Guiding the output guides x0 and eps equally, because both are affine in it. uncond: one row, or one per sample.
        """
        doubled = {name: torch.cat([c, uncond[name].expand_as(c)]) for name, c in cond.items()}

        def denoise(z: Tensor, t: Tensor) -> Denoised:
            conditional, unconditional = self.output(torch.cat([z, z]), torch.cat([t, t]), doubled).chunk(2)
            return self.read(guide(conditional, unconditional, w), z, t)

        return denoise


def coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, b) of `output = a x0 + b eps`, each with the shape of alpha and sigma."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "sample":
        return one, zero
    if prediction_type == "v_prediction":  # 2202.00512, appendix D
        return -sigma, alpha
    return -one, one


def convert_process(denoise: Denoise, inner: Process, outer: Process) -> Denoise:
    """Return a denoiser for points of the process `outer`. denoise: a denoiser of the process `inner`.

    (x0, eps) of a point do not depend on the process: points with equal `alpha / sigma` differ only by a scale. A noise level
    that `inner` lacks is mapped to its nearest level.
    """
    if inner is outer or inner.config == outer.config:
        return denoise

    def converted(z_t: Tensor, t: Tensor) -> Denoised:
        inner_t = inner.timestep_at(outer.half_log_snr(t))
        inner_scale, outer_scale = (torch.hypot(p.alpha(time), p.sigma(time)) for p, time in ((inner, inner_t), (outer, t)))
        return denoise(per_sample(inner_scale / outer_scale, z_t.ndim) * z_t, inner_t)

    return converted
