"""The older consistency models, without guidance: distillation and training (2303.01469, Algorithms 2 and 3)."""

import math
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel

from lcm.core.consistency import cm_consistency_fn
from lcm.core.numbers import Count
from lcm.core.objectives.consistency import Objective
from lcm.core.schedule import NoiseSchedule
from lcm.core.solvers import Solver
from lcm.core.timesteps import karras
from lcm.errors import UserError
from lcm.models.student import unet_like
from lcm.modules.consistency import ConsistencyModule


class UnguidedConsistencyModule(ConsistencyModule):
    """A student without w, in the paper's own parametrisation, on neighbours of a grid of `points` Karras timesteps.

    sigma_data: standard deviation of the latents, see `cm_consistency_fn`.
    """

    takes_w = False

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        objective: Objective,
        points: Count = 18,
        sigma_data: float = 1.0,
        **kwargs: Any,
    ) -> None:
        f = partial(cm_consistency_fn, schedule=schedule, sigma_data=sigma_data)
        super().__init__(
            unet_like(net),
            schedule,
            timesteps=lambda _: karras(schedule, points=points)[1:],
            objective=partial(objective, f=f),
            w_min=0.0,
            w_max=0.0,
            **kwargs,
        )
        self.sigma_data = sigma_data

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "points": None, "sigma_data": self.sigma_data, "timesteps": self.timesteps.tolist()}


class ConsistencyModelDistillation(UnguidedConsistencyModule):
    """CD: distils the UNet of the pipeline `teacher`, whose ODE `solver` (the paper's Phi) follows without guidance."""

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        teacher: str,
        solver: Solver,
        **kwargs: Any,
    ) -> None:
        super().__init__(net, schedule, pipeline=teacher, teacher_net=net, solver=solver, **kwargs)


class ConsistencyModelTraining(UnguidedConsistencyModule):
    """CT: without a teacher. The grid grows from `first_points` to `points`, and mu with it (appendix C).

    `N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1`, `mu(k) = exp(s_0 log(mu_0) / N(k))`, mu_0 = ema_decay.
    pipeline: the folder or hub id whose VAE and text encoder it is trained on.
    """

    def __init__(self, *args: Any, points: Count = 150, first_points: Count = 2, ema_decay: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, points=points, ema_decay=ema_decay, **kwargs)
        self.first_points, self.points, self.first_decay = first_points, points, ema_decay
        self.now = points

    def setup(self, stage: str) -> None:
        if self.trainer.max_steps < 1:
            raise UserError("consistency training's grid grows until trainer.max_steps: give a number of steps")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.grow(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A validation or an export that follows is of the last update, as it was when the checkpoint was written."""
        super().on_load_checkpoint(checkpoint)
        self.grow(max(checkpoint["global_step"] - 1, 0))

    def grow(self, step: int) -> None:
        points = grid_points(step / self.trainer.max_steps, self.first_points, self.points)
        points = min(points, self.schedule.num_timesteps)  # the paper's last grid has a point more than `points`
        if points != self.now:
            self.now = points
            self.timesteps = karras(self.schedule, points=points)[1:]
        if self.target_net is not None:
            self.ema_decay = math.exp(self.first_points * math.log(self.first_decay) / points)


def grid_points(progress: float, first: int, last: int) -> int:
    """N(k) at progress = k / K."""
    return math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1
