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
    """The randomness of a step: eps `[B, C, H, W]`, t `[B]` int64."""

    eps: Tensor
    t: Tensor


class Denoising(nn.Module):
    """`E || target - net(z_t, t, c) ||^2`: the target follows the prediction type, the weight is `min_snr_weight` (None: 1).

    offset_noise: this times one normal a channel is added to eps in training, so that the mean colour is learnt too.
    """

    def __init__(self, process: Process, *, min_snr_gamma: Positive | None = None, offset_noise: NonNegative = 0.0) -> None:
        super().__init__()
        self.process, self.min_snr_gamma, self.offset_noise = process, min_snr_gamma, offset_noise

    def draw(self, z0: Tensor, rng: torch.Generator) -> DenoisingDraws:
        """eps ~ N(0, 1) with the offset in training; t uniform."""
        eps = torch.randn(z0.shape, generator=rng, device=z0.device)
        if self.offset_noise and self.training:
            eps = eps + self.offset_noise * torch.randn(*z0.shape[:2], 1, 1, generator=rng, device=z0.device)
        t = torch.randint(self.process.num_timesteps, (len(z0),), generator=rng, device=z0.device)
        return DenoisingDraws(eps, t)

    def sampling(self) -> dict[str, Any]:
        return {"sampler": "ddim"}

    def scheduler(self, prediction_type: str) -> tuple[str, dict[str, Any]]:
        return ddim_scheduler(self.process, prediction_type)

    def loss(self, net: Denoiser, batch: LatentBatch, draws: DenoisingDraws) -> tuple[Tensor, dict[str, Tensor]]:
        z_t = self.process.jump(batch.z0, draws.eps, draws.t)
        error = net.output(z_t, draws.t, batch.cond) - net.target(batch.z0, draws.eps, draws.t)
        loss = error.square().flatten(1).mean(1)
        if self.min_snr_gamma is not None:
            loss = loss * min_snr_weight(net, draws.t, self.min_snr_gamma)
        return loss.mean(), {}


def min_snr_weight(net: Denoiser, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR weighting (2303.09556, section 3.4), `[B]`: x0's error weighs min(SNR, gamma), in the units of the output.

    At z_t an error of x0 changes the output `a x0 + b eps` by `a - b alpha / sigma`.
    """
    alpha, sigma = net.process.alpha(t).clamp_min(FLOOR), net.process.sigma(t)  # a flow's alpha ends at 0
    a, b = coefficients(net.prediction_type, alpha, sigma)
    return net.process.snr(t).clamp(max=gamma) / (a - b * alpha / sigma).square()


def ddim_scheduler(process: Process, prediction_type: str) -> tuple[str, dict[str, Any]]:
    """Return the class and the config of the diffusers scheduler for DDIM, which is Euler's method in a flow."""
    if isinstance(process, Flow):
        return "FlowMatchEulerDiscreteScheduler", process.config
    # StableDiffusionPipeline asks for steps_offset=1; trailing spacing does not use it.
    options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing", "steps_offset": 1}
    return "DDIMScheduler", {**process.config, "prediction_type": prediction_type, **options}
