"""Latent consistency distillation into adapters (LCM-LoRA, 2311.05556): Algorithm 1 with little to train and to save."""

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from lcm.core.schedule import NoiseSchedule
from lcm.core.solvers import Solver
from lcm.errors import UserError
from lcm.models.lora import TARGETS, is_of_adapter, with_adapters
from lcm.modules.consistency import ConsistencyModule


class LoRADistillation(ConsistencyModule):
    """Distils `net`, the UNet of the pipeline `teacher`, into adapters on it; its own weights are there once and stay.

    The student takes no w: the teacher's guidance is drawn from [w_min, w_max], and the adapters learn what is between.
    rank, alpha (None: as rank), target_modules: see `with_adapters`. ema_decay: mu; 0, as LCM-LoRA has it, makes the student
    its own target, and an average is one of the adapters alone. A checkpoint holds the adapters and their averages.
    """

    takes_w = False

    def __init__(
        self,
        net: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        teacher: str,
        solver: Solver,
        rank: int = 64,
        alpha: int | None = None,
        target_modules: Sequence[str] = TARGETS,
        ema_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        alpha = rank if alpha is None else alpha
        student = with_adapters(net, rank=rank, alpha=alpha, target_modules=target_modules)
        options = {"teacher_net": net, "solver": solver, "ema_decay": ema_decay, **kwargs}
        super().__init__(student, schedule, pipeline=teacher, **options)
        self.rank, self.alpha = rank, alpha
        self.register_state_dict_post_hook(leave_out_frozen)
        self.register_load_state_dict_post_hook(expect_no_frozen)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise UserError("adapters cannot be sharded: train them with trainer=ddp")
        super().configure_model()

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "rank": self.rank, "alpha": self.alpha, "teacher_w": [self.w_min, self.w_max]}


def leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if not is_of_adapter(name)]:
        del state[name]


def expect_no_frozen(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if is_of_adapter(name)]
