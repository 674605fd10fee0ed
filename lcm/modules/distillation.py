"""Latent consistency distillation (LCM, Algorithm 1)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from lcm.core.schedule import NoiseSchedule
from lcm.models.student import make_student
from lcm.modules.consistency import ConsistencyModule


class ConsistencyDistillation(ConsistencyModule):
    """Distils `net`, the UNet of the pipeline `teacher`, into a w-conditioned student that starts as its copy.

    objective: `lcm.core.objectives.distillation.latent_consistency_distillation` or alike; solver: the paper's Psi.
    zero_init: whether the projection of w starts at zero; if not, the student starts as another network.
    """

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        teacher: str,
        objective: Callable[..., Any],
        solver: Callable[..., Tensor],
        zero_init: bool = True,
        **kwargs: Any,
    ) -> None:
        student, objective = make_student(net, zero_init=zero_init), partial(objective, solver=solver)
        super().__init__(student, schedule, pipeline=teacher, objective=objective, **kwargs)
        self.frozen["teacher"] = net.eval()
