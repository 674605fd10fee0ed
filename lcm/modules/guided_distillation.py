"""Guided distillation (2210.03142): a w-conditioned student, then one of half its steps, and so on."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.ema import ema_update_
from lcm.core.errors import UserError
from lcm.core.guidance import check_w_range
from lcm.core.numbers import Count
from lcm.core.objectives.consistency import Networks
from lcm.core.objectives.guided_distillation import GuidedDistillationObjective
from lcm.core.process import Process
from lcm.models.pipeline import load_family
from lcm.models.saving import save_network
from lcm.models.sharding import gather
from lcm.models.student import frozen_copy, quantize_linears
from lcm.modules.latent import LatentModule


class GuidedDistillation(LatentModule):
    """Train a student to match its guided teacher, then students of ever fewer DDIM steps.

    Stage one: the student matches the guided teacher for any w in [w_min, w_max]. Then one stage for each number in `steps`:
    a student of N DDIM steps starts from the previous student and learns two of its steps in one.

    net: the pipeline's network, the teacher. match_share: stage one's share of `trainer.max_steps`. The later stages divide the
    rest equally. All students are saved in one folder, which is sampled with any number in `steps`.
    quantization: `nn.Linear -> nn.Module` for the teacher's linear layers.
    """

    objective: GuidedDistillationObjective

    def __init__(
        self,
        net: Any,
        process: Process,
        *,
        pipeline: str,
        steps: list[Count],
        match_share: float = 0.5,
        w_min: float = 2.0,
        w_max: float = 14.0,
        zero_init: bool = True,
        quantization: Callable[[nn.Linear], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        check_w_range(w_min, w_max)
        if not steps or any(more != 2 * fewer for more, fewer in pairwise(steps)):
            raise UserError(f"model.steps={steps}: each number must be half of the one before it, as in [8, 4, 2, 1]")
        if not 0 < match_share < 1:
            raise UserError(f"model.match_share={match_share} is not between 0 and 1: set 0.5, for example")
        student = load_family(pipeline).with_w(net, zero_init=zero_init)
        super().__init__(
            student,
            process,
            pipeline=pipeline,
            objective=lambda p: GuidedDistillationObjective(p, w_min=w_min, w_max=w_max),
            **kwargs,
        )
        if not self.family.takes_w(student):
            raise UserError(f"guided distillation needs a network with an input for w, which {pipeline} lacks: use model=lcd")
        self.zero_init = zero_init
        self.previous = frozen_copy(self.net)  # the finished student of the previous stage
        self.steps, self.match_share = list(steps), match_share
        self.stage = 0
        self.frozen["teacher"], self.quantization = quantize_linears(net, quantization).eval(), quantization

    @property
    def students(self) -> list[int]:
        """Return the step counts of the students of the finished stages and of the current stage."""
        return self.steps[: self.stage]

    def stage_at(self, step: int) -> int:
        """Return the stage of a step: 0 is stage one, n is the stage of `steps[n - 1]`."""
        first = self.match_share * self.trainer.max_steps
        if step < first:
            return 0
        return min(1 + int(len(self.steps) * (step - first) / (self.trainer.max_steps - first)), len(self.steps))

    def setup(self, stage: str) -> None:
        steps, stages = self.trainer.max_steps, len(self.steps) + 1
        if len(set(map(self.stage_at, range(steps)))) < stages:
            raise UserError(
                f"trainer.max_steps={steps} leaves one of {stages} stages without a step: set more steps, or fewer model.steps"
            )

    def on_train_start(self) -> None:
        """Copy the finished students from the checkpoint's run, if it is another run: checkpoints do not hold them."""
        if not self.students[1:]:
            return
        other_run, this_run = Path(str(self.trainer.ckpt_path)).parent.parent / "students", self.folder_of(self.steps[0]).parent
        if self.trainer.is_global_zero and other_run.is_dir() and other_run.resolve() != this_run.resolve():
            with suppress(OSError):  # every rank names a missing student below
                shutil.copytree(other_run, this_run, dirs_exist_ok=True)
        self.trainer.strategy.barrier()
        self.extra_networks()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        while self.stage < self.stage_at(self.global_step):
            self.finish_stage()

    def finish_stage(self) -> None:
        """Save the student of a finished stage, and start the next one from it."""
        finished = self.best_net
        if self.stage and (student := gather(finished)) is not None and self.trainer.is_global_zero:
            save_network(self.folder_of(self.steps[self.stage - 1]), student)
        for network in (self.previous, self.net):
            ema_update_(network.parameters(), finished.parameters(), 0.0)
        self.enter_stage(self.stage + 1)

    def enter_stage(self, stage: int) -> None:
        self.stage = stage
        self.objective.steps = self.steps[stage - 1] if stage else 0

    def folder_of(self, steps: int) -> Path:
        """Return the folder of the finished student of this number of steps."""
        return Path(self.trainer.default_root_dir, "students", f"unet_{steps}")

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        self.log("train/stage", float(self.stage), batch_size=len(batch))
        return super().training_step(batch, batch_idx)

    def denoisers(self, online: nn.Module) -> Networks:
        return Networks(*(self.denoiser(net) for net in (online, self.previous, self.frozen["teacher"])))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage"] = self.stage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.stage = checkpoint.get("stage", 0)
        super().on_load_checkpoint(checkpoint)
        self.enter_stage(checkpoint["stage"])

    def fixed_settings(self) -> dict[str, Any]:
        return {**super().fixed_settings(), **({"model.steps": self.steps} if self.stage else {})}

    def lcm_json(self) -> dict[str, Any]:
        w_range = {"w_min": self.objective.w_min, "w_max": self.objective.w_max}
        return {**super().lcm_json(), **w_range, "students": self.students}

    def extra_networks(self) -> dict[str, Path]:
        folders = {f"unet_{steps}": self.folder_of(steps) for steps in self.students[:-1]}
        if missing := [folder for folder in folders.values() if not folder.is_dir()]:
            raise UserError(f"the finished student {missing[0]} is missing: copy it from the run that wrote the checkpoint")
        return folders
