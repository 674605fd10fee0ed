"""Processes started by SLURM."""

import os

from lightning.pytorch.plugins.environments import SLURMEnvironment

from lcm.core.errors import UserError


def slurm_environment() -> SLURMEnvironment:
    """Return ranks and rendezvous from SLURM's variables. Raises UserError outside of `srun`."""
    if "SLURM_PROCID" not in os.environ:
        raise UserError("trainer=slurm needs to be started by SLURM: `sbatch docker/train.sbatch ...`; or choose trainer=ddp")
    return SLURMEnvironment(auto_requeue=False)


def set_step_rendezvous() -> None:
    """Set the address of this `srun`'s rendezvous: its first node, and a port that no other `srun` of the job has."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    step = int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    env.setdefault("MASTER_PORT", str(15000 + (int(env.get("SLURM_JOB_ID", 0)) + step) % 10000))  # step 0: as Lightning
