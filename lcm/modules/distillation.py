"""Latent consistency distillation (LCM, Algorithm 1)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from lcm.core.schedule import NoiseSchedule
from lcm.modules.consistency import ConsistencyModule


class ConsistencyDistillation(ConsistencyModule):
    """Distils `net`, the UNet of the pipeline `teacher`, into a w-conditioned student that starts as its copy.

    objective: `lcm.core.objectives.distillation.latent_consistency_distillation` or alike; solver: the paper's Psi.
    """

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        teacher: str,
        objective: Callable[..., Any],
        solver: Callable[..., Tensor],
        **kwargs: Any,
    ) -> None:
        super().__init__(net, schedule, pipeline=teacher, objective=partial(objective, solver=solver), **kwargs)
        self.frozen["teacher"] = net.eval()
