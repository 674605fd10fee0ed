"""Latent consistency distillation (LCM, Algorithm 1)."""

from typing import Any

from diffusers import UNet2DConditionModel

from lcm.core.schedule import NoiseSchedule
from lcm.core.solvers import Solver
from lcm.models.student import make_student
from lcm.modules.consistency import ConsistencyModule


class LatentConsistencyDistillation(ConsistencyModule):
    """Distils `net`, the UNet of the pipeline `teacher`, into a w-conditioned student that starts as its copy.

    zero_init: whether the projection of w starts at zero; if not, the student starts as another network.
    """

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        teacher: str,
        solver: Solver,
        zero_init: bool = True,
        **kwargs: Any,
    ) -> None:
        student = make_student(net, zero_init=zero_init)
        super().__init__(student, schedule, pipeline=teacher, teacher_net=net, solver=solver, **kwargs)
        self.zero_init = zero_init
