"""Training of the latent diffusion teacher: denoising score matching (Latent Diffusion, eq. 2)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Denoiser, coefficients
from lcm.core.numbers import NonNegative, Positive
from lcm.core.process import FLOOR, Flow, Process


@dataclass
class DenoisingDraws:
    """The random draws of a step: eps `[B, C, H, W]`, t `[B]` int64."""

    eps: Tensor
    t: Tensor


class Denoising(nn.Module):
    """`E || target - net(z_t, t, c) ||^2`, with the target of the network's prediction type.

    min_snr_gamma: the gamma of `min_snr_weight`; None: equal weights. offset_noise: the standard deviation of a normal number
    per channel. In training it is added to eps, so that the network learns the mean colour.
    """

    def __init__(self, process: Process, *, min_snr_gamma: Positive | None = None, offset_noise: NonNegative = 0.0) -> None:
        super().__init__()
        self.process, self.min_snr_gamma, self.offset_noise = process, min_snr_gamma, offset_noise

    def draw(self, z0: Tensor, rng: torch.Generator) -> DenoisingDraws:
        """Draw eps ~ N(0, 1), in training with the offset, and t uniformly."""
        eps = torch.randn(z0.shape, generator=rng, device=z0.device)
        if self.offset_noise and self.training:
            eps = eps + self.offset_noise * torch.randn(*z0.shape[:2], 1, 1, generator=rng, device=z0.device)
        t = torch.randint(self.process.num_timesteps, (len(z0),), generator=rng, device=z0.device)
        return DenoisingDraws(eps, t)

    def sampling(self) -> dict[str, Any]:
        """Return the sampler's settings for `lcm.json`, as plain data."""
        return {"sampler": "ddim"}

    def scheduler(self, prediction_type: str) -> tuple[str, dict[str, Any]]:
        """Return the class name and the config of the diffusers scheduler saved with the network."""
        return ddim_scheduler(self.process, prediction_type)

    def loss(self, net: Denoiser, batch: LatentBatch, draws: DenoisingDraws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and values to log."""
        z_t = self.process.jump(batch.z0, draws.eps, draws.t)
        error = net.output(z_t, draws.t, batch.cond) - net.target(batch.z0, draws.eps, draws.t)
        loss = error.square().flatten(1).mean(1)
        if self.min_snr_gamma is not None:
            loss = loss * min_snr_weight(net, draws.t, self.min_snr_gamma)
        return loss.mean(), {}


def min_snr_weight(net: Denoiser, t: Tensor, gamma: float) -> Tensor:
    """Return the Min-SNR weights `[B]` of an output's squared error (2303.09556, section 3.4).

    They weight x0's squared error by min(SNR, gamma). An error of x0 at a fixed z_t changes the output `a x0 + b eps` by
    `a - b alpha / sigma` times that error.
    """
    alpha, sigma = net.process.alpha(t).clamp_min(FLOOR), net.process.sigma(t)  # alpha is 0 in a flow's pure noise
    a, b = coefficients(net.prediction_type, alpha, sigma)
    return net.process.snr(t).clamp(max=gamma) / (a - b * alpha / sigma).square()


def ddim_scheduler(process: Process, prediction_type: str) -> tuple[str, dict[str, Any]]:
    """Return the class name and the config of diffusers' DDIM scheduler, or of its Euler scheduler for a flow."""
    if isinstance(process, Flow):
        return "FlowMatchEulerDiscreteScheduler", process.config
    # StableDiffusionPipeline asks for steps_offset=1; trailing spacing does not use it.
    options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1}
    return "DDIMScheduler", {**process.config, "prediction_type": prediction_type, **options}
