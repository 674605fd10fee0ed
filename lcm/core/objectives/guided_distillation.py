"""Guided distillation (2210.03142): one network matches the guided teacher, then the number of DDIM steps is halved."""

from typing import Any

import torch
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Condition, Denoiser, convert_process
from lcm.core.guidance import draw_w
from lcm.core.objectives.consistency import ConsistencyDraws, Loss, Networks
from lcm.core.objectives.denoising import ddim_scheduler
from lcm.core.process import Process
from lcm.core.solvers import ddim
from lcm.core.timesteps import trailing_steps


class GuidedDistillationObjective(nn.Module):
    """Stage one while `steps` is 0. Afterwards `steps` is the student's number of DDIM steps.

    w is uniform in [w_min, w_max]. The networks of `loss` are the student, the previous student (as target) and the teacher.
    """

    def __init__(self, process: Process, *, w_min: float, w_max: float) -> None:
        super().__init__()
        self.process, self.w_min, self.w_max, self.steps = process, w_min, w_max, 0
        self.paths: dict[tuple[int, torch.device], Tensor] = {}

    def draw(self, z0: Tensor, rng: torch.Generator) -> ConsistencyDraws:
        """Draw eps ~ N(0, 1), w ~ U[w_min, w_max] and a uniform index, of a timestep (stage one) or of a student's step."""
        eps = torch.randn(z0.shape, generator=rng, device=z0.device)
        index = torch.randint(self.steps or self.process.num_timesteps, (len(z0),), generator=rng, device=z0.device)
        return ConsistencyDraws(eps, index, draw_w(len(z0), self.w_min, self.w_max, rng))

    def loss(self, nets: Networks, batch: LatentBatch, draws: ConsistencyDraws) -> Loss:
        """Return the loss of the current stage, and values to log."""
        if self.steps == 0:
            assert nets.teacher is not None
            return match_guided_teacher(nets.online, nets.teacher, batch, draws)
        return halve_steps(nets.online, nets.target, batch, draws, timesteps=self.path(2 * self.steps, batch.z0.device))

    def path(self, steps: int, device: torch.device) -> Tensor:
        """Return the timesteps of `steps` DDIM steps, then t_min. The tensor is cached: a copy would wait for the device."""
        if (steps, device) not in self.paths:
            times = [*trailing_steps(steps, self.process.num_timesteps), self.process.t_min]
            self.paths[steps, device] = torch.tensor(times, device=device)
        return self.paths[steps, device]

    def sampling(self) -> dict[str, Any]:
        """Return the sampler's settings for `lcm.json`, as plain data."""
        return {"sampler": "ddim"}

    def scheduler(self, prediction_type: str) -> tuple[str, dict[str, Any]]:
        """Return the class name and the config of the diffusers scheduler saved with a student."""
        return ddim_scheduler(self.process, prediction_type)


def match_guided_teacher(student: Denoiser, teacher: Denoiser, batch: LatentBatch, draws: ConsistencyDraws) -> Loss:
    """Return stage one's loss `omega(lambda_t) || x_teacher(z_t, c; w) - x_student(z_t, c, w) ||^2` (section 3.1).

    draws.index: t, any timestep.
    """
    t = draws.index
    z_t = student.process.jump(batch.z0, draws.eps, t)
    with torch.no_grad():
        guided = teacher.guided(batch.cond, batch.uncond, draws.w)
        target = convert_process(guided, teacher.process, student.process)(z_t, t).x0
    return x0_loss(student, batch.cond, draws.w, z_t, t, target)


def halve_steps(
    student: Denoiser, previous: Denoiser, batch: LatentBatch, draws: ConsistencyDraws, *, timesteps: Tensor
) -> Loss:
    """Return the loss of a later stage (section 3.2; 2202.00512, Algorithm 2).

    One DDIM step of the student matches two steps of the previous student. timesteps: `[2N + 1]`, descending, the previous
    student's 2N steps and t_min. draws.index: the step of the student, 0 to N - 1.
    """
    process = student.process
    t, middle, s = (timesteps[2 * draws.index + i] for i in range(3))
    z_t = process.jump(batch.z0, draws.eps, t)
    with torch.no_grad():
        denoise = previous.bound(batch.cond, draws.w)
        z_s = ddim(denoise, ddim(denoise, z_t, t, middle, process=process), middle, s, process=process)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t, z_t.ndim), process.at(s, z_t.ndim)
        ratio = sigma_s / sigma_t
        target = (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)  # the x0 for which one DDIM step gives z_s
    return x0_loss(student, batch.cond, draws.w, z_t, t, target)


def x0_loss(student: Denoiser, cond: Condition, w: Tensor, z_t: Tensor, t: Tensor, target: Tensor) -> Loss:
    """Return the squared error of x0 with the "truncated SNR" weight `max(alpha^2 / sigma^2, 1)` (2202.00512, section 4)."""
    error = (student(z_t, t, cond, w).x0 - target).square().flatten(1).mean(1)
    weight = student.process.snr(t).clamp_min(1.0)
    return (weight * error).mean(), {"x0_l2": error.detach().mean()}
