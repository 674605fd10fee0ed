"""Trajectory consistency distillation (TCD, 2402.19159)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import convert_process
from lcm.core.errors import UserError
from lcm.core.numbers import Share
from lcm.core.objectives.consistency import ConsistencyDraws, Loss, Networks
from lcm.core.objectives.distillation import LatentConsistencyDistillation
from lcm.core.process import Flow
from lcm.core.timesteps import skip_pair


@dataclass
class TrajectoryDraws(ConsistencyDraws):
    """eps, index and w of `ConsistencyDraws`, and share `[B]` in [0, 1), which selects the end time."""

    share: Tensor


class TrajectoryConsistencyDistillation(LatentConsistencyDistillation):
    """The student's jump from t matches its target's jump from s, both to an end time m <= s (TCF(1), eq. 12).

    m is uniform over the clean end and the grid's points up to s. In a flow, m = t_min alone would be LCM's Algorithm 1.
    gamma: the default stochasticity of the saved student's sampler, see `lcm.core.sampling.tcd`.
    """

    sampler: ClassVar[str] = "tcd"

    def __init__(self, *args: Any, gamma: Share = 0.3, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 <= gamma <= 1:
            raise UserError(f"model.objective.gamma={gamma} is not in [0, 1]: set a value from 0 to 1")
        if gamma and isinstance(self.process, Flow):
            raise UserError("diffusers has no stochastic TCD sampler for flow models: set model.objective.gamma=0")
        self.gamma = gamma

    def draw(self, z0: Tensor, rng: torch.Generator) -> TrajectoryDraws:
        draws = super().draw(z0, rng)
        return TrajectoryDraws(draws.eps, draws.index, draws.w, torch.rand(len(z0), generator=rng, device=z0.device))

    def loss(self, nets: Networks, batch: LatentBatch, draws: TrajectoryDraws) -> Loss:  # type: ignore[override]
        t, s = skip_pair(self.timesteps, draws.index, self.skip_steps, self.process.t_min)
        end = self.end_time(s, draws.share)
        z_t = self.process.jump(batch.z0, draws.eps, t)
        assert nets.teacher is not None
        with torch.no_grad():
            guided = nets.teacher.guided(batch.cond, batch.uncond, draws.w)
            z_s = self.solver(convert_process(guided, nets.teacher.process, self.process), z_t, t, s, process=self.process)
        return self.distances(
            lambda: self.process.jump(*nets.online(z_t, t, batch.cond, draws.w), end),
            lambda: self.process.jump(*nets.target(z_s, s, batch.cond, draws.w), end),
            z_t.device,
        )

    def end_time(self, s: Tensor, share: Tensor) -> Tensor:
        """Return m `[B]`: the clean end or a grid point up to s. share `[B]` in [0, 1) selects among them."""
        ends = torch.nn.functional.pad(self.timesteps, (1, 0), value=self.process.t_min)
        count = torch.searchsorted(self.timesteps, s, right=True) + 1
        return ends[(share * count).long().clamp(max=count - 1)]

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "gamma": self.gamma}

    def scheduler(self, prediction_type: str) -> tuple[str, dict[str, Any]]:
        _, config = super().scheduler(prediction_type)
        return ("FlowMatchEulerDiscreteScheduler" if isinstance(self.process, Flow) else "TCDScheduler"), config
