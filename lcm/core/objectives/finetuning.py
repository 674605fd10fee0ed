"""Latent consistency fine-tuning on a custom dataset, without a teacher (LCM, Algorithm 4)."""

from typing import Any

from lcm.core.batch import LatentBatch
from lcm.core.numbers import SkipSteps
from lcm.core.objectives.consistency import ConsistencyDraws, ConsistencyObjective, Networks, Pair
from lcm.core.process import Process
from lcm.core.timesteps import skip_pair


class LatentConsistencyFinetuning(ConsistencyObjective):
    """Like distillation, without a teacher: z_t and z_s are the same z0 with the same eps.

    skip_steps: the paper's k, in timesteps.
    """

    def __init__(self, process: Process, *, skip_steps: SkipSteps = 20, **options: Any) -> None:
        super().__init__(process, **options)
        self.skip_steps = skip_steps

    def pair(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Pair:
        t, s = skip_pair(self.timesteps, draws.index, self.skip_steps, self.process.t_min)
        z_t = self.process.jump(batch.z0, draws.eps, t)
        z_s = self.process.jump(batch.z0, draws.eps, s)
        return self.compare(nets, batch.cond, draws.w, (z_t, t), (z_s, s))
