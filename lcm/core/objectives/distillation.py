"""Latent consistency distillation (LCM, Algorithm 1)."""

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.networks import Networks, guided
from lcm.core.numbers import SkipSteps
from lcm.core.objectives.consistency import ConsistencyDraws, Distance, Loss, consistency_loss
from lcm.core.schedule import NoiseSchedule
from lcm.core.solvers import Solver
from lcm.core.timesteps import skip_pair


def latent_consistency_distillation(
    nets: Networks,
    batch: LatentBatch,
    draws: ConsistencyDraws,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    solver: Solver,
    distance: Distance,
    skip_steps: SkipSteps = 20,
) -> Loss:
    """The student at t agrees with its target at s, one guided solver step of the teacher nearer the data."""
    t, s = skip_pair(timesteps, draws.index, skip_steps)  # t_{n+k}, t_n
    z_t = schedule.add_noise(batch.z0, draws.eps, t)
    assert nets.teacher is not None
    with torch.no_grad():
        z_s = solver(guided(nets.teacher, batch.cond, batch.uncond, schedule, draws.w), z_t, t, s, schedule=schedule)
    return consistency_loss(nets, batch.cond, draws.w, (z_t, t), (z_s, s), schedule=schedule, distance=distance)
