"""Consistency distillation and training: a student, its target network, and the teacher of a distillation."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Denoiser
from lcm.core.ema import ema_update_
from lcm.core.errors import UserError
from lcm.core.guidance import check_w_range
from lcm.core.objectives.consistency import Distance, Networks
from lcm.core.process import Process
from lcm.models.families import network_like
from lcm.models.lora import with_adapters
from lcm.models.pipeline import load_family, load_prediction_type
from lcm.models.student import frozen_copy, quantize_linears
from lcm.modules.adversary import LatentAdversary, latent_adversary
from lcm.modules.latent import LatentModule
from lcm.modules.optimization import log_train
from lcm.modules.terms import further_terms, reward_parts


class ConsistencyModule(LatentModule):
    """Trains a student, a copy of `net`, by a consistency objective (LCD, TCD, LCF, CD, CT).

    net: the pipeline's network: the teacher of a distillation, and the start of the student.
    objective: `(process, distance=..., timesteps=..., solver=..., w_min=..., w_max=...) -> ConsistencyObjective`.
    loss: the paper's d. timesteps: `num_timesteps -> [N] int64`, the trained t. solver: the paper's Psi.
    ema_decay: the paper's mu of the target network; 0: the student is its own target.
    w_min, w_max: the range of guidance weights. The student takes w as an input if they are set and its family supports it.
    zero_init: the projection of w starts at zero, so the student starts equal to its teacher.
    prediction_type: the output of the student; None: the output of the teacher.
    adapters: `{rank, alpha, target_modules}` trains LoRA adapters on the teacher's weights (2311.05556). Such a student takes
        no w, and a checkpoint holds only the adapters and their averages.
    adversary: `channels of the features -> LatentAdversary`, whose loss in the teacher's features is added.
    reward: `(images in [0, 1], captions) -> [B]`, raised for the student's clean latents. It has a `weight`, and a
        `description` for `lcm.json`.
    quantization: `nn.Linear -> nn.Module` for the frozen linear layers of the teacher, and with adapters of the student.
    """

    averages = MappingProxyType({**LatentModule.averages, "target_net": "model.ema_decay"})

    def __init__(
        self,
        net: Any,
        process: Process,
        *,
        pipeline: str,
        objective: Callable[..., Any],
        loss: Distance,
        ema_decay: float = 0.95,
        w_min: float | None = None,
        w_max: float | None = None,
        timesteps: Callable[[int], Tensor] | None = None,
        solver: Callable[..., Tensor] | None = None,
        zero_init: bool = True,
        adapters: Mapping[str, Any] | None = None,
        adversary: Callable[..., LatentAdversary] | None = None,
        reward: nn.Module | None = None,
        quantization: Callable[[nn.Linear], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= ema_decay < 1:
            raise UserError(f"model.ema_decay={ema_decay} is not in [0, 1): set 0.95, or 0 for no average")
        if adversary is not None and solver is None:
            raise UserError(
                "model.adversary needs a teacher's features, and this method has no teacher: use model=lcd or model=cd"
            )
        if quantization is not None and solver is None and adapters is None:
            raise UserError(
                "model.quantization has no effect: this method has no teacher and no adapters, so no weights are frozen. Set "
                "model/quantization=null"
            )
        parts: dict[str, Any] = {"distance": loss}
        if timesteps is not None:
            parts["timesteps"] = timesteps(process.num_timesteps)
        if solver is not None:
            parts["solver"] = solver
        if w_min is not None and w_max is not None:
            check_w_range(w_min, w_max)
            parts |= {"w_min": w_min, "w_max": w_max}
        family = load_family(pipeline)
        if adapters is not None:
            student = with_adapters(family, quantize_linears(net, quantization), **adapters)
        else:
            student = family.with_w(net, zero_init=zero_init) if w_max is not None else network_like(net)
        judge = latent_adversary(adversary, family, net)
        super().__init__(
            student,
            process,
            pipeline=pipeline,
            objective=lambda p: objective(p, **parts),
            adapters=adapters,
            opponents=[judge] if judge else [],
            **kwargs,
        )
        self.adversary = judge
        self.teacher_prediction_type = load_prediction_type(pipeline)
        # In train mode, like the student, so that both draw the same dropout mask.
        self.target_net = frozen_copy(self.net).train() if ema_decay else None
        self.ema_decay = ema_decay
        if w_max is not None and adapters is None:
            self.zero_init = zero_init
        if solver is not None:
            self.frozen["teacher"] = quantize_linears(net, None if adapters else quantization).eval()
        self.frozen |= reward_parts(reward, pipeline)
        self.quantization = quantization

    def setup(self, stage: str) -> None:
        self.objective.advance(0, self.trainer.max_steps)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.objective.advance(self.global_step, self.trainer.max_steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the objective to the checkpoint's last update, for a validation or an export that follows."""
        super().on_load_checkpoint(checkpoint)
        self.objective.advance(max(checkpoint["global_step"] - 1, 0), self.trainer.max_steps)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        if self.adversary is None and "reward" not in self.frozen:
            return super().training_step(batch, batch_idx)
        draws = self.draws(self.objective.draw, batch.z0, batch_idx)
        pair = self.objective.pair(self.denoisers(self.net), batch, draws)
        loss, logs = self.objective.distances(pair)
        terms, values = further_terms(self, pair, batch, batch_idx)
        log_train(self, loss + terms, {**logs, **values}, len(batch))
        return loss + terms

    def denoisers(self, online: nn.Module) -> Networks:
        student, teacher = self.denoiser(online), self.frozen.get("teacher")
        target = student if self.target_net is None else self.denoiser(self.target_net)
        if teacher is None:
            return Networks(student, target)
        return Networks(student, target, Denoiser(self.network(teacher), self.process, self.teacher_prediction_type))

    def after_optimizer_step(self) -> None:
        super().after_optimizer_step()
        if self.target_net is not None:
            decay = self.objective.target_decay(self.ema_decay)
            ema_update_(self.target_net.parameters(), self.net.parameters(), decay, self.optimization.skipped_on_device)

    def lcm_json(self) -> dict[str, Any]:
        return {**super().lcm_json(), **self.w_metadata()}
