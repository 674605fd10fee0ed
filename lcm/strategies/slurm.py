"""Processes that SLURM started."""

import os

from lightning.pytorch.plugins.environments import SLURMEnvironment

from lcm.errors import UserError


def slurm_environment() -> SLURMEnvironment:
    """Ranks and rendezvous as SLURM set them for this process. Raises UserError outside `srun`."""
    if "SLURM_PROCID" not in os.environ:
        raise UserError("trainer=slurm needs to be started by SLURM: `sbatch docker/train.sbatch ...`; or choose trainer=ddp")
    return SLURMEnvironment(auto_requeue=False)
