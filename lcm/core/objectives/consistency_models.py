"""Consistency models of 2303.01469: distillation (Algorithm 2) and training (Algorithm 3), without guidance."""

import math
from functools import partial
from typing import Any

import torch

from lcm.core.batch import LatentBatch
from lcm.core.consistency import cm_consistency_fn
from lcm.core.denoiser import convert_process
from lcm.core.errors import UserError
from lcm.core.numbers import Count, Positive
from lcm.core.objectives.consistency import ConsistencyDraws, ConsistencyObjective, Networks, Pair
from lcm.core.process import Process
from lcm.core.solvers import Solver
from lcm.core.timesteps import karras, neighbours


class ConsistencyModel(ConsistencyObjective):
    """The base of both methods: pairs of neighbours on a Karras grid, and the paper's consistency function.

    points: the number of points of the grid. sigma_data: the standard deviation of the latents, see `cm_consistency_fn`.
    """

    def __init__(self, process: Process, *, points: Count = 18, sigma_data: Positive = 1.0, **options: Any) -> None:
        f = partial(cm_consistency_fn, sigma_data=sigma_data)
        super().__init__(process, timesteps=karras(process, points=points)[1:], f=f, **options)
        self.points, self.sigma_data = points, sigma_data

    def sampling(self) -> dict[str, Any]:
        trained = {"points": None, "timesteps": self.timesteps.tolist(), "sigma_data": self.sigma_data}
        return {**super().sampling(), **trained}


class ConsistencyDistillation(ConsistencyModel):
    """The student at t_{n+1} matches its target at t_n, which one solver step of the teacher reaches (k = 1)."""

    def __init__(self, process: Process, *, solver: Solver, **options: Any) -> None:
        super().__init__(process, **options)
        self.solver = solver

    def pair(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Pair:
        t, s = neighbours(self.timesteps, draws.index, self.process.t_min)
        z_t = self.process.jump(batch.z0, draws.eps, t)
        assert nets.teacher is not None
        with torch.no_grad():
            denoise = convert_process(nets.teacher.bound(batch.cond), nets.teacher.process, self.process)
            z_s = self.solver(denoise, z_t, t, s, process=self.process)
        return self.compare(nets, batch.cond, None, (z_t, t), (z_s, s))


class ConsistencyTraining(ConsistencyModel):
    """Like distillation, without a teacher: z_t and z_s are the same z0 with the same eps.

    The grid grows from `first_points` to `points`, and mu grows with it (appendix C):
    `N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1`, `mu(k) = exp(s_0 log(mu_0) / N(k))`, mu_0 = ema_decay.
    """

    def __init__(self, process: Process, *, points: Count = 150, first_points: Count = 2, **options: Any) -> None:
        super().__init__(process, points=points, **options)
        self.first_points, self.points_now = first_points, points

    def advance(self, step: int, max_steps: int) -> None:
        if max_steps < 1:
            raise UserError("the grid of consistency training grows until trainer.max_steps: set trainer.max_steps")
        points = grid_points(step / max_steps, self.first_points, self.points)
        points = min(points, self.process.num_timesteps)  # N(K) is points + 1
        if points != self.points_now:
            self.points_now = points
            self.timesteps = karras(self.process, points=points, device=self.timesteps.device)[1:]

    def target_decay(self, decay: float) -> float:
        return math.exp(self.first_points * math.log(decay) / self.points_now)

    def pair(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Pair:
        t, s = neighbours(self.timesteps, draws.index, self.process.t_min)
        z_t = self.process.jump(batch.z0, draws.eps, t)
        z_s = self.process.jump(batch.z0, draws.eps, s)
        return self.compare(nets, batch.cond, None, (z_t, t), (z_s, s))


def grid_points(progress: float, first: int, last: int) -> int:
    """Return N(k) at progress = k / K."""
    return math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1
