"""Latent consistency fine-tuning (LCM, Algorithm 4)."""

from typing import Any

from diffusers import UNet2DConditionModel

from lcm.core.schedule import NoiseSchedule
from lcm.models.student import make_student
from lcm.modules.consistency import ConsistencyModule


class LatentConsistencyFineTuning(ConsistencyModule):
    """Fine-tunes a copy of `net`, the UNet of the consistency model `student`, on another dataset without a teacher.

    zero_init: as in distillation, of a UNet that does not take w yet.
    """

    def __init__(
        self, net: UNet2DConditionModel, schedule: NoiseSchedule, *, student: str, zero_init: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(make_student(net, zero_init=zero_init), schedule, pipeline=student, **kwargs)
        self.zero_init = zero_init
