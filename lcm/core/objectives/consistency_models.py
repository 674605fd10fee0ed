"""Consistency models of 2303.01469: distillation (Algorithm 2) and training (Algorithm 3), without guidance."""

from functools import partial
from typing import Any

import torch

from lcm.core.batch import LatentBatch
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import seen_from
from lcm.core.objectives.consistency import ConsistencyDraws, ConsistencyObjective, Loss, Networks
from lcm.core.process import Process
from lcm.core.solvers import Solver
from lcm.core.timesteps import karras, neighbours


class ConsistencyModel(ConsistencyObjective):
    """Neighbours of a Karras grid of `points` timesteps, in the paper's own parametrisation.

    sigma_data: the latents' standard deviation, see `cm_consistency_fn`.
    """

    def __init__(self, process: Process, *, points: int, sigma_data: float = 1.0, **options: Any) -> None:
        f = partial(cm_consistency_fn, sigma_data=sigma_data)
        super().__init__(process, timesteps=karras(process, points=points)[1:], f=f, **options)
        self.points, self.sigma_data = points, sigma_data

    def sampling(self) -> dict[str, Any]:
        trained = {"points": None, "timesteps": self.timesteps.tolist(), "sigma_data": self.sigma_data}
        return {**super().sampling(), **trained}


class ConsistencyDistillation(ConsistencyModel):
    """The student at t_{n+1} agrees with its target at t_n, one solver step of the teacher nearer the data: k = 1."""

    def __init__(self, process: Process, *, solver: Solver, **options: Any) -> None:
        super().__init__(process, **options)
        self.solver = solver

    def loss(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Loss:
        t, s = neighbours(self.timesteps, draws.index, self.process.t_min)
        z_t = self.process.jump(batch.z0, draws.eps, t)
        assert nets.teacher is not None
        with torch.no_grad():
            denoise = seen_from(nets.teacher.bound(batch.cond), nets.teacher.process, self.process)
            z_s = self.solver(denoise, z_t, t, s, process=self.process)
        return self.compare(nets, batch.cond, None, (z_t, t), (z_s, s))


class ConsistencyTraining(ConsistencyModel):
    """As distillation, but without a teacher: z_t and z_s are the same z0 noised with the same eps."""

    def loss(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Loss:
        t, s = neighbours(self.timesteps, draws.index, self.process.t_min)
        z_t = self.process.jump(batch.z0, draws.eps, t)
        z_s = self.process.jump(batch.z0, draws.eps, s)
        return self.compare(nets, batch.cond, None, (z_t, t), (z_s, s))
