"""Trajectory consistency distillation (TCD, 2402.19159)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.numbers import Count, Share
from lcm.core.objectives.consistency import ConsistencyDraws, Networks, Pair, stage_at
from lcm.core.objectives.distillation import LatentConsistencyDistillation
from lcm.core.process import Flow
from lcm.core.timesteps import phase_edges, phase_end, phase_start, points_of


@dataclass
class TrajectoryDraws(ConsistencyDraws):
    """eps, index and w of `ConsistencyDraws`, and share `[B]` in [0, 1), which selects the end time."""

    share: Tensor


class TrajectoryConsistencyDistillation(LatentConsistencyDistillation):
    """The student's jump from t matches its target's jump from s, both to an end time m <= s (TCF(1), eq. 12).

    m is uniform over the clean end and the grid's points up to s. In a flow, m = t_min alone would be LCM's Algorithm 1.
    gamma: the default stochasticity of the saved student's sampler, see `lcm.core.sampling.tcd`.
    phases: the number of phases in each stage of the training. The stages are equally long, and m stays in the phase of t.
    [1] is TCD. [8, 4, 2, 1] is the curriculum of TSCD (Hyper-SD, 2404.13686).
    """

    sampler: ClassVar[str] = "tcd"
    schedulers: ClassVar[tuple[str, str]] = ("TCDScheduler", "FlowMatchEulerDiscreteScheduler")
    edges: Tensor

    def __init__(self, *args: Any, gamma: Share = 0.3, phases: Sequence[Count] = (1,), **options: Any) -> None:
        if phases and phases[-1] > 1:
            options = {"saved_steps": phases[-1], **options}
        super().__init__(*args, **options)
        if not phases:
            raise UserError("model.objective.phases=[] has no stage: use [1] for TCD, [8,4,2,1] for TSCD")
        if not 0 <= gamma <= 1:
            raise UserError(f"model.objective.gamma={gamma} is not in [0, 1]: set a value from 0 to 1")
        if gamma and isinstance(self.process, Flow):
            raise UserError("diffusers has no stochastic TCD sampler for flow models: set model.objective.gamma=0")
        self.gamma, self.phases, edges = gamma, list(phases), list(map(self.edges_of, phases))
        self.register_buffer("edges", edges[0], persistent=False)

    def edges_of(self, phases: int) -> Tensor:
        return phase_edges(self.process, phases, points_of(self.timesteps, self.process.num_timesteps))

    def draw(self, z0: Tensor, rng: torch.Generator) -> TrajectoryDraws:
        draws = super().draw(z0, rng)
        return TrajectoryDraws(draws.eps, draws.index, draws.w, torch.rand(len(z0), generator=rng, device=z0.device))

    def pair(self, nets: Networks, batch: LatentBatch, draws: TrajectoryDraws) -> Pair:  # type: ignore[override]
        t = self.timesteps[draws.index]
        edge = phase_end(t, self.edges)
        s = torch.maximum(t - self.skip_steps, edge)
        z_t, z_s = self.teacher_step(nets, batch, draws, t, s)
        end, start = self.end_time(s, draws.share, edge), phase_start(t, self.edges, self.process.num_timesteps - 1)
        return self.compare_jumps(nets, batch.cond, draws.w, (z_t, t), (z_s, s), end, start)

    def end_time(self, s: Tensor, share: Tensor, edge: Tensor | None = None) -> Tensor:
        """Return m `[B]`: the end of the phase, or a grid point above the end and up to s.

        share `[B]` in [0, 1) selects m. edge: the end of the phase, `[B]`; None: the clean end.
        """
        edge = torch.full_like(s, self.process.t_min) if edge is None else edge
        below = torch.searchsorted(self.timesteps, edge, right=True)
        count = torch.searchsorted(self.timesteps, s, right=True) - below + 1
        number = (share * count).long().clamp(max=count - 1)
        return torch.where(number == 0, edge, self.timesteps[below + number - 1])

    def advance(self, step: int, max_steps: int) -> None:
        """Choose the number of phases of this stage of the training."""
        phases = self.phases[stage_at(step, max_steps, len(self.phases))]
        if phases != len(self.edges):
            self.edges = self.edges_of(phases).to(self.timesteps.device)

    def sampling(self) -> dict[str, Any]:
        settings = {**super().sampling(), "gamma": self.gamma}
        return {**settings, "phases": self.phases[-1]} if self.phases[-1] > 1 else settings
