"""Latent consistency fine-tuning on a custom dataset, without a teacher (LCM, Algorithm 4)."""

from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.networks import Networks
from lcm.core.numbers import SkipSteps
from lcm.core.objectives.consistency import ConsistencyDraws, Distance, Loss, consistency_loss
from lcm.core.schedule import NoiseSchedule
from lcm.core.timesteps import skip_pair


def latent_consistency_finetuning(
    nets: Networks,
    batch: LatentBatch,
    draws: ConsistencyDraws,
    *,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    distance: Distance,
    skip_steps: SkipSteps = 20,
) -> Loss:
    """As distillation, but z_t and z_s are the same z0 noised with the same eps at the two times."""
    t, s = skip_pair(timesteps, draws.index, skip_steps)
    z_t = schedule.add_noise(batch.z0, draws.eps, t)
    z_s = schedule.add_noise(batch.z0, draws.eps, s)
    return consistency_loss(nets, batch.cond, draws.w, (z_t, t), (z_s, s), schedule=schedule, distance=distance)
