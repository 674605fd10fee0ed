"""Phased consistency distillation (PCM, 2405.18407)."""

from typing import Any, ClassVar

import torch

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.numbers import Count
from lcm.core.objectives.consistency import ConsistencyDraws, Networks, Pair
from lcm.core.objectives.distillation import LatentConsistencyDistillation
from lcm.core.timesteps import phase_edges, phase_end, phase_start, points_of


class PhasedConsistencyDistillation(LatentConsistencyDistillation):
    """The time is cut into phases. The student's jump from t to the end of its phase matches its target's jump from s (eq. 9).

    phases: the number of phases, which is also the number of sampling steps. classifier_free_guidance: the teacher's step has
    no guidance. The student then takes no w, and is guided when it is sampled, also by negative prompts.

    The phases end at the timesteps of diffusers' few-step grid: 759, 499, 259 and 0 for 4 phases of 50 points. The authors'
    code counts points from the clean end: 739, 499, 239 and 0. No scheduler of diffusers samples these by default.
    """

    sampler: ClassVar[str] = "tcd"  # with gamma = 0: one jump for each phase
    schedulers: ClassVar[tuple[str, str]] = ("TCDScheduler", "FlowMatchEulerDiscreteScheduler")
    edges: torch.Tensor

    def __init__(self, *args: Any, phases: Count = 4, classifier_free_guidance: bool = False, **options: Any) -> None:
        super().__init__(*args, **{"saved_steps": phases, **options})
        if classifier_free_guidance and self.w_max:
            raise UserError(
                "model.objective.classifier_free_guidance=true distils without w: set model.w_min=null model.w_max=null"
            )
        self.phases, self.classifier_free_guidance = phases, classifier_free_guidance
        edges = phase_edges(self.process, phases, points_of(self.timesteps, self.process.num_timesteps))
        self.register_buffer("edges", edges, persistent=False)

    def pair(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Pair:
        t = self.timesteps[draws.index]
        end, start = phase_end(t, self.edges), phase_start(t, self.edges, self.process.num_timesteps - 1)
        s = torch.maximum(t - self.skip_steps, end)
        z_t, z_s = self.teacher_step(nets, batch, draws, t, s, guided=not self.classifier_free_guidance)
        return self.compare_jumps(nets, batch.cond, draws.w, (z_t, t), (z_s, s), end, start)

    def sampling(self) -> dict[str, Any]:
        settings = {**super().sampling(), "gamma": 0.0, "phases": self.phases}
        return {**settings, "classifier_free_guidance": True} if self.classifier_free_guidance else settings
