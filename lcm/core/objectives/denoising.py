"""Training of the latent diffusion teacher: denoising score matching (Latent Diffusion, eq. 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.networks import Network
from lcm.core.numbers import Positive
from lcm.core.schedule import NoiseSchedule


@dataclass
class DenoisingDraws:
    """The randomness of a step: eps `[B, C, H, W]`, t `[B]` int64."""

    eps: Tensor
    t: Tensor


def draw(z0: Tensor, rng: torch.Generator, *, schedule: NoiseSchedule, offset_noise: float = 0.0) -> DenoisingDraws:
    """eps ~ N(0, 1), plus `offset_noise` times one normal a channel so that the mean colour is learnt too; t uniform."""
    eps = torch.randn(z0.shape, generator=rng, device=z0.device)
    if offset_noise:
        eps = eps + offset_noise * torch.randn(*z0.shape[:2], 1, 1, generator=rng, device=z0.device)
    t = torch.randint(schedule.num_timesteps, (len(z0),), generator=rng, device=z0.device)
    return DenoisingDraws(eps, t)


def denoising(
    net: Network,
    batch: LatentBatch,
    draws: DenoisingDraws,
    *,
    schedule: NoiseSchedule,
    min_snr_gamma: Positive | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`E || target - net(z_t, t, c) ||^2`, target by the schedule's prediction type, weighted by `min_snr_weight`."""
    z_t = schedule.add_noise(batch.z0, draws.eps, draws.t)
    output = net(z_t, draws.t, batch.cond, None).float()
    loss = (output - schedule.target(batch.z0, draws.eps, draws.t)).square().flatten(1).mean(1)
    if min_snr_gamma is not None:
        loss = loss * min_snr_weight(schedule, draws.t, min_snr_gamma)
    return loss.mean(), {}


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR weighting (2303.09556, section 3.4): x0's error weighs min(SNR, gamma), in the prediction type's units; `[B]`."""
    snr = schedule.snr(t)
    own = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[schedule.prediction_type]
    return snr.clamp(max=gamma) / own
