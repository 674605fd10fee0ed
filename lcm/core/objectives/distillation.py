"""Latent consistency distillation (LCM, Algorithm 1)."""

from typing import Any

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Condition, convert_process
from lcm.core.numbers import SkipSteps
from lcm.core.objectives.consistency import ConsistencyDraws, ConsistencyObjective, Networks, Pair
from lcm.core.process import Process
from lcm.core.solvers import Solver
from lcm.core.timesteps import skip_pair


class LatentConsistencyDistillation(ConsistencyObjective):
    """The student at t matches its target at s, which one guided solver step of the teacher reaches.

    solver: the paper's Psi. skip_steps: the paper's k, in timesteps.
    """

    def __init__(self, process: Process, *, solver: Solver, skip_steps: SkipSteps = 20, **options: Any) -> None:
        super().__init__(process, **options)
        self.solver, self.skip_steps = solver, skip_steps

    def pair(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Pair:
        t, s = skip_pair(self.timesteps, draws.index, self.skip_steps, self.process.t_min)  # t_{n+k}, t_n
        z_t, z_s = self.teacher_step(nets, batch, draws, t, s)
        return self.compare(nets, batch.cond, draws.w, (z_t, t), (z_s, s))

    def teacher_step(
        self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws, t: Tensor, s: Tensor, *, guided: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return z_t, and z_s after one solver step of the teacher. guided: guide the teacher by the drawn w."""
        z_t = self.process.jump(batch.z0, draws.eps, t)
        assert nets.teacher is not None
        with torch.no_grad():
            denoise = nets.teacher.guided(batch.cond, batch.uncond, draws.w) if guided else nets.teacher.bound(batch.cond)
            z_s = self.solver(convert_process(denoise, nets.teacher.process, self.process), z_t, t, s, process=self.process)
        return z_t, z_s

    def compare_jumps(
        self,
        nets: Networks,
        cond: Condition,
        w: Tensor | None,
        far: tuple[Tensor, Tensor],
        near: tuple[Tensor, Tensor],
        end: Tensor,
        start: Tensor,
    ) -> Pair:
        """Return the pair of two jumps to `end` `[B]`: the student's from far, its target's from near.

        far: (z_t, t). near: (z_s, s). start: the noisy end of the phase of t, `[B]`.
        """
        return self.make_pair(lambda: nets.online(*far, cond, w), lambda: nets.target(*near, cond, w), end, start)
