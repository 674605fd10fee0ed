"""Consistency models of 2303.01469: distillation (Algorithm 2) and training (Algorithm 3), without guidance."""

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.consistency import ConsistencyFn
from lcm.core.networks import Networks, conditioned
from lcm.core.objectives.consistency import ConsistencyDraws, Distance, Loss, consistency_loss
from lcm.core.schedule import NoiseSchedule
from lcm.core.solvers import Solver
from lcm.core.timesteps import neighbours


def consistency_distillation(
    nets: Networks,
    batch: LatentBatch,
    draws: ConsistencyDraws,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    solver: Solver,
    distance: Distance,
    f: ConsistencyFn,
) -> Loss:
    """The student at t_{n+1} agrees with its target at t_n, one solver step of the teacher nearer the data: k = 1.

    timesteps: `[N - 1]` ascending, the grid above t_min = 0; draws.index: n, of them.
    """
    t, s = neighbours(timesteps, draws.index)
    z_t = schedule.add_noise(batch.z0, draws.eps, t)
    assert nets.teacher is not None
    with torch.no_grad():
        z_s = solver(conditioned(nets.teacher, batch.cond, schedule), z_t, t, s, schedule=schedule)
    return consistency_loss(nets, batch.cond, None, (z_t, t), (z_s, s), schedule=schedule, distance=distance, f=f)


def consistency_training(
    nets: Networks,
    batch: LatentBatch,
    draws: ConsistencyDraws,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    distance: Distance,
    f: ConsistencyFn,
) -> Loss:
    """As distillation, but without a teacher: z_t and z_s are the same z0 noised with the same eps."""
    t, s = neighbours(timesteps, draws.index)
    z_t = schedule.add_noise(batch.z0, draws.eps, t)
    z_s = schedule.add_noise(batch.z0, draws.eps, s)
    return consistency_loss(nets, batch.cond, None, (z_t, t), (z_s, s), schedule=schedule, distance=distance, f=f)
