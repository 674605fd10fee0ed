"""Distribution matching: the images of a few-step student get the distribution of its guided teacher's images.

The fake score is a network that learns the student's images during the training. Both scores predict the clean image of a
noised student image. The teacher's prediction moves it to images that are likelier for the teacher. The fake score's prediction
moves it to images that are likelier for the student. The student follows the difference of the two moves.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Denoised, Denoiser, convert_process
from lcm.core.guidance import draw_w
from lcm.core.numbers import Count
from lcm.core.objectives.consistency import ConsistencyObjective, Loss, Networks, Pair
from lcm.core.process import FLOOR, Process, per_sample
from lcm.core.timesteps import POINTS, grid, phase_edges


@dataclass
class MatchingDraws:
    """The random draws of a step.

    noise: the noise of the student's steps, `[B, steps, C, H, W]`. index: the student's last step, counted from the clean end,
    `[B]`. eps `[B, 2, C, H, W]` and share `[B, 2]` in [0, 1): noise and time of the comparison of the scores, then of the fake
    score's loss. w: the guidance weight, `[B]`.
    """

    noise: Tensor
    index: Tensor
    eps: Tensor
    share: Tensor
    w: Tensor


class Sample(NamedTuple):
    """The student's prediction (x0, eps) in a step from the time `start` `[B]` to `end` `[B]`."""

    x0: Tensor
    eps: Tensor
    start: Tensor
    end: Tensor

    def detach(self) -> "Sample":
        return Sample(self.x0.detach(), self.eps.detach(), self.start, self.end)


class DistributionMatching(ConsistencyObjective):
    """Subclasses define the student's steps, the inputs of the scores, and the fake score's loss.

    steps: the number of the student's steps. Each step starts at a point of the few-step grid. The student's samples are the
    images of the training: only the captions of a batch are used. `distance` and `target_move` define the loss.
    """

    starts: Tensor
    ends: Tensor

    def __init__(self, process: Process, *, steps: Count = 4, **options: Any) -> None:
        super().__init__(process, timesteps=grid(process.num_timesteps), saved_steps=steps, **options)
        self.steps, self.step = steps, 0
        ends = phase_edges(process, steps, POINTS)  # ascending from the clean end
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("starts", torch.cat([ends[1:], torch.tensor([process.num_timesteps - 1])]), persistent=False)

    def draw_shared_step(self, rng: torch.Generator) -> None:
        """Draw the last step of all samples of all ranks, counted from the clean end."""
        self.step = int(torch.randint(self.steps, (), generator=rng))

    def draw(self, z0: Tensor, rng: torch.Generator) -> MatchingDraws:
        noise = torch.randn(len(z0), self.steps, *z0.shape[1:], generator=rng, device=z0.device)
        index = torch.randint(self.steps, (len(z0),), generator=rng, device=z0.device)
        eps = torch.randn(len(z0), 2, *z0.shape[1:], generator=rng, device=z0.device)
        share = torch.rand(len(z0), 2, generator=rng, device=z0.device)
        return MatchingDraws(noise, index, eps, share, draw_w(len(z0), self.w_min, self.w_max, rng))

    def sample(self, student: Denoiser, batch: LatentBatch, draws: MatchingDraws) -> Sample:
        """Return the student's prediction in its last step. The steps before it have no gradient."""
        raise NotImplementedError

    def rollout(self, student: Denoiser, batch: LatentBatch, draws: MatchingDraws, last: int) -> list[Tensor]:
        """Return the student's inputs in order, from pure noise to the input of the step `last`, counted from the clean end."""
        denoise, inputs = student.bound(batch.cond, draws.w), [draws.noise[:, 0]]
        with torch.no_grad():
            for number, step in enumerate(range(self.steps - 1, last, -1)):
                t = self.starts[step].expand(len(draws.w))
                inputs.append(self.next_input(denoise(inputs[-1], t), self.ends[step].expand_as(t), draws.noise[:, number + 1]))
        return inputs

    def next_input(self, denoised: Denoised, end: Tensor, noise: Tensor) -> Tensor:
        """Return the student's next input, at the time `end` `[B]`. noise: `[B, C, H, W]`."""
        raise NotImplementedError

    def score_input(self, sample: Sample, eps: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return a noised sample and its time `[B]`, the input of both scores. share `[B]` in [0, 1) selects the time."""
        raise NotImplementedError

    def score_loss(self, fake: Denoiser, batch: LatentBatch, draws: MatchingDraws, sample: Sample) -> Tensor:
        """Return the loss of the fake score, which learns the student's samples."""
        raise NotImplementedError

    def target_move(self, difference: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's move away from the student's x0, `[B, C, H, W]`, and the weights of the samples, `[B]`.

        difference: the teacher's prediction less the fake score's. gap `[B]`: the mean absolute difference of a sample from the
        teacher's prediction.
        """
        raise NotImplementedError

    def pair(self, nets: Networks, batch: LatentBatch, draws: MatchingDraws) -> Pair:
        return self.pair_with_target(nets, batch, draws, self.sample(nets.online, batch, draws))

    def pair_without_target(self, sample: Sample) -> Pair:
        """Return the student's clean latents as both points of a pair, for a step without a comparison of the scores."""
        end = torch.full_like(sample.end, self.process.t_min)
        return Pair(sample.x0, sample.x0, sample.x0, end, torch.full_like(end, self.process.num_timesteps - 1))

    def pair_with_target(self, nets: Networks, batch: LatentBatch, draws: MatchingDraws, sample: Sample) -> Pair:
        """Return the student's x0 and its target, moved by `real - fake`: the guided teacher's less the fake score's x0."""
        assert nets.teacher is not None
        assert nets.fake is not None
        x0 = sample.x0.detach()
        with torch.no_grad():
            z_t, t = self.score_input(sample.detach(), draws.eps[:, 0], draws.share[:, 0])
            guided = nets.teacher.guided(batch.cond, batch.uncond, draws.w)
            real = convert_process(guided, nets.teacher.process, self.process)(z_t, t).x0
            fake = nets.fake(z_t, t, batch.cond, draws.w).x0
            move, weight = self.target_move(real - fake, (x0 - real).abs().flatten(1).mean(1).clamp_min(FLOOR))
        return self.pair_without_target(sample)._replace(target=x0 + move, weight=weight)

    def distances(self, pair: Pair) -> Loss:
        """Return the loss, whose value means nothing, and `move`: the mean absolute move of the targets."""
        loss, _ = super().distances(pair)
        return loss, {"move": (pair.online.detach() - pair.target).abs().mean()}

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "phases": self.steps}


class TrajectoryDistributionMatching(DistributionMatching):
    """TDM (2503.06674): deterministic steps. The scores are compared in the phase of a sample's last step.

    Each sample has another last step. The student jumps to the end of this step, and gets noise up to a time within it.
    """

    sampler: ClassVar[str] = "tcd"  # with gamma = 0
    schedulers: ClassVar[tuple[str, str]] = ("TCDScheduler", "FlowMatchEulerDiscreteScheduler")

    def sample(self, student: Denoiser, batch: LatentBatch, draws: MatchingDraws) -> Sample:
        inputs = torch.stack(self.rollout(student, batch, draws, 0))
        z = inputs[self.steps - 1 - draws.index, torch.arange(len(draws.w), device=inputs.device)]
        start, end = self.starts[draws.index], self.ends[draws.index]
        return Sample(*student(z, start, batch.cond, draws.w), start, end)

    def next_input(self, denoised: Denoised, end: Tensor, noise: Tensor) -> Tensor:
        return self.process.jump(*denoised, end)

    def score_input(self, sample: Sample, eps: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sample at a time t, uniform from the end of its step to 1 % of the schedule below its start.

        t is at least 2 % of the schedule.
        """
        points = self.process.num_timesteps
        low, high = sample.end.clamp_min(points // 50), sample.start - points // 100
        t = low + (share * (high - low)).long()
        return self.process.renoise(self.process.jump(sample.x0, sample.eps, sample.end), sample.end, t, eps), t

    def score_loss(self, fake: Denoiser, batch: LatentBatch, draws: MatchingDraws, sample: Sample) -> Tensor:
        """Return the squared error of x0, weighted by min(SNR, 5) and by the ratio of two densities (the authors' code).

        The noise in z_t, `mixed`, is not normal. The ratio is the normal density at `mixed` over that at the drawn eps, per
        element.
        """
        eps = draws.eps[:, 1]
        z_t, t = self.score_input(sample, eps, draws.share[:, 1])
        alpha, sigma = self.process.at(t, z_t.ndim)
        mixed = (z_t - alpha * sample.x0) / sigma
        ratio = ((eps.square() - mixed.square()).flatten(1).mean(1) / 2).exp()
        error = (fake(z_t, t, batch.cond, draws.w).x0 - sample.x0).square().flatten(1).mean(1)
        return (self.process.snr(t).clamp(max=5) * ratio * error).mean()

    def target_move(self, difference: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        return difference, 1 / gap

    def sampling(self) -> dict[str, Any]:
        return {**super().sampling(), "gamma": 0.0}


class ImprovedDistributionMatching(DistributionMatching):
    """DMD2 (2405.14867): stochastic steps. The scores are compared at any time.

    Between two steps the student's x0 gets fresh noise. All samples of all ranks have the same last step.
    """

    def sample(self, student: Denoiser, batch: LatentBatch, draws: MatchingDraws) -> Sample:
        z = self.rollout(student, batch, draws, self.step)[-1]
        start, end = (times[self.step].expand(len(z)) for times in (self.starts, self.ends))
        return Sample(*student(z, start, batch.cond, draws.w), start, end)

    def next_input(self, denoised: Denoised, end: Tensor, noise: Tensor) -> Tensor:
        return self.process.jump(denoised.x0, noise, end)

    def score_input(self, sample: Sample, eps: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sample at a time t, uniform in 2 % to 98 % of the schedule."""
        points = self.process.num_timesteps
        t = points // 50 + (share * (points - 2 * (points // 50) + 1)).long()
        return self.process.jump(sample.x0, eps, t), t

    def score_loss(self, fake: Denoiser, batch: LatentBatch, draws: MatchingDraws, sample: Sample) -> Tensor:
        """Return the denoising loss of the network's output, at any time."""
        t, eps = (draws.share[:, 1] * self.process.num_timesteps).long(), draws.eps[:, 1]
        output = fake.output(self.process.jump(sample.x0, eps, t), t, batch.cond, draws.w)
        return (output - fake.target(sample.x0, eps, t)).square().mean()

    def target_move(self, difference: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Return a move for which the squared error has the gradient `(fake - real) / gap` (DMD, 2311.18828, section 3.2)."""
        return difference / per_sample(gap, difference.ndim), torch.full_like(gap, 0.5)
