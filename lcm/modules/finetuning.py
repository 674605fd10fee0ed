"""Latent consistency fine-tuning (LCM, Algorithm 4)."""

from typing import Any

from diffusers import UNet2DConditionModel

from lcm.core.schedule import NoiseSchedule
from lcm.modules.consistency import ConsistencyModule


class ConsistencyFineTuning(ConsistencyModule):
    """Fine-tunes `net`, the UNet of the consistency model `student`, on another dataset without a teacher."""

    def __init__(self, net: UNet2DConditionModel, schedule: NoiseSchedule, *, student: str, **kwargs: Any) -> None:
        super().__init__(net, schedule, pipeline=student, **kwargs)
