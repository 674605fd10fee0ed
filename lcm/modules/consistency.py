"""What consistency distillations and trainings share: a student, its target network, the draws of a step."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.ema import ema_update_
from lcm.core.guidance import check_w_range
from lcm.core.networks import Networks
from lcm.core.objectives.consistency import Distance, Loss, Objective, draw
from lcm.core.schedule import NoiseSchedule
from lcm.core.solvers import Solver
from lcm.core.timesteps import points_of
from lcm.errors import UserError
from lcm.models.student import frozen_copy
from lcm.modules.latent import LatentModule


class ConsistencyModule(LatentModule):
    """Trains a student `net` against `target_net`, its moving average.

    timesteps: of the schedule's number of them, those t that are trained, `[N]` int64.
    objective: see `lcm.core.objectives.consistency`; loss: the paper's d. w is drawn from [w_min, w_max].
    ema_decay: the paper's mu; 0 makes the student its own target, and no second copy exists.
    teacher_net, solver: of a distillation, the network that is kept as it is, and the paper's Psi.
    """

    averages = MappingProxyType({**LatentModule.averages, "target_net": "model.ema_decay"})
    consistency = True
    takes_w = True  # the student
    timesteps: Tensor

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        timesteps: Callable[[int], Tensor],
        objective: Objective,
        loss: Distance,
        teacher_net: UNet2DConditionModel | None = None,
        solver: Solver | None = None,
        ema_decay: float = 0.95,
        w_min: float = 2.0,
        w_max: float = 14.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= ema_decay < 1:
            raise UserError(f"model.ema_decay={ema_decay} is not in [0, 1)")
        check_w_range(w_min, w_max)
        super().__init__(net, schedule, **kwargs)
        # In the student's mode, so that both draw one dropout mask.
        self.target_net = frozen_copy(self.net).train() if ema_decay else None
        self.register_buffer("timesteps", timesteps(schedule.num_timesteps), persistent=False)
        self.objective, self.loss = objective if solver is None else partial(objective, solver=solver), loss
        if teacher_net is not None:
            self.frozen["teacher"] = teacher_net.eval()
        self.ema_decay, self.w_min, self.w_max = ema_decay, w_min, w_max

    def networks(self, stage: str = "train") -> Networks:
        """Return what an objective compares; a validation's student is the network that is saved."""
        online = self.network(self.net if stage == "train" else self.best_net)
        teacher = self.frozen.get("teacher")
        target = online if self.target_net is None else self.network(self.target_net)
        return Networks(online, target, None if teacher is None else self.network(teacher))

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        loss, logs = self.consistency_step(batch, batch_idx, "train")
        self.log_train(loss, logs, len(batch))
        return loss

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        loss, _ = self.consistency_step(batch, batch_idx, "val")
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def consistency_step(self, batch: LatentBatch, batch_idx: int, stage: str) -> Loss:
        options = {"timesteps": self.timesteps, "w_min": self.w_min, "w_max": self.w_max}
        draws = self.draws(draw, batch.z0, batch_idx, stage, **options)
        return self.objective(
            self.networks(stage), batch, draws, schedule=self.schedule, timesteps=self.timesteps, distance=self.loss
        )

    def after_optimizer_step(self) -> None:
        super().after_optimizer_step()
        if self.target_net is not None:
            ema_update_(self.target_net.parameters(), self.net.parameters(), self.ema_decay, self.left_out_on_device)

    def facts(self) -> dict[str, Any]:
        w_range = {"w_min": self.w_min, "w_max": self.w_max} if self.takes_w else {}
        return {**super().facts(), **w_range, "points": points_of(self.timesteps, self.schedule.num_timesteps)}
