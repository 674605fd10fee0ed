"""Distribution matching (TDM, DMD2): a student, its frozen teacher, and a fake score that learns the student's images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Denoiser
from lcm.core.errors import UserError
from lcm.core.guidance import check_w_range
from lcm.core.numbers import Count
from lcm.core.objectives.consistency import Distance, Networks
from lcm.core.objectives.distribution_matching import DistributionMatching
from lcm.core.process import Process
from lcm.core.random import generator
from lcm.models.lora import with_adapters
from lcm.models.pipeline import find, load_family, load_network, load_prediction_type, read_lcm_json
from lcm.models.student import quantize_linears
from lcm.modules.adversary import LatentAdversary, latent_adversary
from lcm.modules.latent import LatentModule
from lcm.modules.optimization import Opponent, OptimizerFactory, ScheduleFactory, log_train
from lcm.modules.terms import further_terms, reward_parts


class FakeScore(Opponent):
    """The score of the student's images, which learns in every step.

    ratio: the updates of the fake score for each update of the student. The other arguments are those of `Optimization`.
    """

    def __init__(
        self, network: nn.Module, *, optimizer: OptimizerFactory, lr_schedule: ScheduleFactory, ratio: Count = 1
    ) -> None:
        super().__init__(network, optimizer, lr_schedule)
        self.ratio = ratio


class MatchingModule(LatentModule):
    """Trains a student, a copy of `net`, by distribution matching. Batches give captions only, except to an adversary.

    net: the pipeline's network: a few-step student, or a teacher.
    teacher: the pipeline of the teacher; None: the teacher that the student was distilled from, or `pipeline`.
    objective: `(process, distance=..., w_min=..., w_max=...) -> DistributionMatching`. loss: the distance of the objective.
    w_min, w_max: the range of guidance weights of the teacher. Student and fake score take w as an input if the family
        supports it.
    fake: `network -> FakeScore`.
    adapters: `{rank, alpha, target_modules}` trains the student and the fake score as adapters (LoRA) on frozen weights. They
        take no w. If `net` is the teacher, then student, fake score and teacher share the frozen weights.
    adversary, reward, quantization: see `ConsistencyModule`.
    """

    objective: DistributionMatching

    def __init__(
        self,
        net: Any,
        process: Process,
        *,
        pipeline: str,
        objective: Callable[..., Any],
        loss: Distance,
        fake: Callable[..., FakeScore],
        teacher: str | None = None,
        w_min: float = 0.0,
        w_max: float = 0.0,
        adapters: Mapping[str, Any] | None = None,
        adversary: Callable[..., LatentAdversary] | None = None,
        reward: nn.Module | None = None,
        quantization: Callable[[nn.Linear], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        check_w_range(w_min, w_max)
        family, source = load_family(pipeline), teacher or teacher_of(pipeline)
        frozen = net if source == pipeline else load_network(source)
        if adapters is None:
            student, scorer = family.with_w(net), family.with_w(frozen)
        elif family.takes_w(net):
            raise UserError(
                f"{pipeline} takes w as an input, and the fake score's adapters do not: set model.adapters=null, or "
                "model.pipeline to a teacher or to a student of adapters"
            )
        else:
            for base in {net, frozen}:
                quantize_linears(base, quantization)
            student, scorer = (with_adapters(family, base, **adapters) for base in (net, frozen))
        score, judge = fake(scorer), latent_adversary(adversary, family, frozen)
        if judge is not None and judge.real != "data":
            raise UserError("distribution matching has no target point to take for real: set model.adversary.real=data")
        super().__init__(
            student,
            process,
            pipeline=pipeline,
            objective=lambda p: objective(p, distance=loss, w_min=w_min, w_max=w_max),
            adapters=adapters,
            opponents=[score, judge] if judge else [score],
            **kwargs,
        )
        self.fake, self.teacher, self.teacher_prediction_type = score, source, load_prediction_type(source)
        self.adversary = judge
        self.frozen["teacher"] = quantize_linears(frozen, None if adapters else quantization).eval()
        self.frozen |= reward_parts(reward, pipeline)
        self.quantization = quantization
        self.student_turn = True  # the student learns in this step

    def networks(self) -> list[Any]:
        return [*super().networks(), self.fake.network]

    def denoisers(self, online: nn.Module) -> Networks:
        student = self.denoiser(online)
        teacher, fake = (
            Denoiser(self.network(net), self.process, self.teacher_prediction_type)
            for net in (self.frozen["teacher"], self.fake.network)
        )
        return Networks(student, student, teacher, fake)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """Update the fake score in every step, and the student in every step whose number is a multiple of `ratio`."""
        self.student_turn = (self.global_step + 1) % self.fake.ratio == 0
        nets, draws = self.denoisers(self.net), self.draws_of_step(batch, batch_idx, "train")
        with torch.set_grad_enabled(self.student_turn):
            sample = self.objective.sample(nets.online, batch, draws)
        assert nets.fake is not None
        score, detached = nets.fake, sample.detach()
        logs = {"fake_score": self.fake.learn(lambda: self.objective.score_loss(score, batch, draws, detached), self.share)}
        loss, pair = torch.zeros((), device=self.device), self.objective.pair_without_target(sample)
        if self.student_turn:
            pair = self.objective.pair_with_target(nets, batch, draws, sample)
            loss, values = self.objective.distances(pair)
            logs |= values
        terms, values = further_terms(self, pair, batch, batch_idx)
        log_train(self, loss + terms, {**logs, **values}, len(batch))
        return loss + terms

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        draws = self.draws_of_step(batch, batch_idx, "val")
        loss, _ = self.objective.loss(self.denoisers(self.best_net), batch, draws)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def draws_of_step(self, batch: LatentBatch, batch_idx: int, stage: str) -> Any:
        """Draw the step that all ranks share, and return this rank's draws."""
        self.objective.draw_shared_step(generator("cpu", self.seed, stage, batch_idx, "shared"))
        return self.draws(self.objective.draw, batch.z0, batch_idx, stage)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # not in a step without an update of the student: its optimizer then finds no gradient
            super().backward(loss, *args, **kwargs)

    def after_optimizer_step(self) -> None:
        if self.student_turn:
            super().after_optimizer_step()

    def lcm_json(self) -> dict[str, Any]:
        return {**super().lcm_json(), **self.w_metadata(), "teacher": self.teacher}


def teacher_of(pipeline: str) -> str:
    """Return the pipeline that a student was distilled from, or `pipeline` itself if it is a teacher."""
    metadata = read_lcm_json(find(pipeline))
    if metadata["sampler"] == "ddim":
        return pipeline
    source = metadata.get("teacher") or metadata.get("pipeline")
    if source is None:
        raise UserError(f"{pipeline} is a few-step model that names no teacher: set model.teacher=<folder or hub id>")
    try:
        find(source)
    except UserError as error:
        raise UserError(f"the teacher of {pipeline} cannot be found: set model.teacher=<folder or hub id> ({error})") from error
    return teacher_of(source)
