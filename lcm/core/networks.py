"""How the core calls a network: `net(z_t, t, cond, w)`; caption, w, guidance and prediction type bound into a `Denoise`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lcm.core.condition import Condition, doubled
from lcm.core.guidance import guide
from lcm.core.prediction import Denoise, Denoised
from lcm.core.schedule import NoiseSchedule

Network = Callable[..., Tensor]  # net(z_t [B, C, H, W], t [B] int64, cond: Condition, w [B] or None) -> [B, C, H, W]


class Networks(NamedTuple):
    """The paper's theta, theta- and (for distillation) the teacher."""

    online: Network
    target: Network
    teacher: Network | None = None


def conditioned(net: Network, cond: Condition, schedule: NoiseSchedule, w: Tensor | None = None) -> Denoise:
    """A denoiser of one forward: a w-conditioned student, or a teacher without guidance."""
    return lambda z, t: schedule.denoised(net(z, t, cond, w).float(), z, t)


def guided(net: Network, cond: Condition, uncond: Condition, schedule: NoiseSchedule, w: Tensor) -> Denoise:
    """A teacher under classifier-free guidance: conditional and unconditional as one forward of 2B.

    Guiding the network's output guides x0 and eps alike, since both are affine in it. cond: of B, uncond: of 1.
    """
    both = doubled(cond, uncond)

    def denoise(z: Tensor, t: Tensor) -> Denoised:
        of_cond, of_uncond = net(torch.cat([z, z]), torch.cat([t, t]), both, None).float().chunk(2)
        return schedule.denoised(guide(of_cond, of_uncond, w), z, t)

    return denoise
