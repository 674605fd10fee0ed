"""Easy consistency tuning (ECT, 2406.14548): consistency training whose two times approach each other in stages."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.guidance import draw_w
from lcm.core.numbers import Count, Positive
from lcm.core.objectives.consistency import ConsistencyObjective, Networks, Pair, stage_at
from lcm.core.process import Process, per_sample


@dataclass
class EasyDraws:
    """The random draws of a step: eps `[B, C, H, W]`, the noise level sigma / alpha `[B]`, w `[B]`."""

    eps: Tensor
    level: Tensor
    w: Tensor


class EasyConsistencyTuning(ConsistencyObjective):
    """The student at noise level t matches its target at a level r < t of the same image and noise. The weight is 1 / (t - r).

    A level is sigma / alpha. log t ~ N(mean, std^2), limited to the levels of the process. The training has `stages` stages of
    equal length. In stage i, `r = max(0, t (1 - q^-(i + 1) (1 + 8 sigmoid(-t))))`. At r = 0 the target is the image: the
    training starts as denoising.
    """

    def __init__(
        self, process: Process, *, q: Positive = 2.0, stages: Count = 8, mean: float = -1.1, std: Positive = 2.0, **options: Any
    ) -> None:
        super().__init__(process, **options)
        if q <= 1:
            raise UserError(f"model.objective.q={q:g} never brings the two times together: set it above 1")
        self.q, self.stages, self.mean, self.std, self.stage = q, stages, mean, std, 0

    def advance(self, step: int, max_steps: int) -> None:
        self.stage = stage_at(step, max_steps, self.stages)

    def draw(self, z0: Tensor, rng: torch.Generator) -> EasyDraws:
        eps = torch.randn(z0.shape, generator=rng, device=z0.device)
        level = (self.mean + self.std * torch.randn(len(z0), generator=rng, device=z0.device)).exp()
        return EasyDraws(eps, level, draw_w(len(z0), self.w_min, self.w_max, rng))

    def near_level(self, level: Tensor) -> Tensor:
        """Return r `[B]` for t `[B]`, both noise levels."""
        return (level * (1 - self.q ** -(self.stage + 1) * (1 + 8 * torch.sigmoid(-level)))).clamp_min(0)

    def pair(self, nets: Networks, batch: LatentBatch, draws: EasyDraws) -> Pair:
        lowest, highest = self.level_at(self.process.t_min), self.level_at(self.process.num_timesteps - 1)
        level = draws.level.clamp(lowest.clamp_min(1e-3), highest)
        near = self.near_level(level)
        clean = near <= lowest
        t, s = (self.process.timestep_at(-value.clamp_min(1e-6).log()) for value in (level, near))
        z_t, z_s = (self.process.jump(batch.z0, draws.eps, time) for time in (t, s))
        online, target = nets.online.bound(batch.cond, draws.w), nets.target.bound(batch.cond, draws.w)
        return self.make_pair(
            lambda: self.f(online, z_t, t, process=self.process),
            lambda: torch.where(per_sample(clean, z_s.ndim), batch.z0, self.f(target, z_s, s, process=self.process)),
            torch.full((len(z_t),), self.process.t_min, device=z_t.device),
            weight=1 / (level - near),
        )

    def level_at(self, t: int) -> Tensor:
        """Return sigma / alpha at a timestep, `[]`."""
        time = torch.tensor([t], device=self.timesteps.device)
        return (-self.process.half_log_snr(time)).exp().squeeze(0)
