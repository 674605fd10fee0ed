"""The base of consistency objectives: the random draws of a step, and the distance between two points of a trajectory.

An objective defines its draws, its loss, the sampler of its students and the scheduler saved with them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.consistency import ConsistencyFn, consistency_fn
from lcm.core.denoiser import Condition, Denoised, Denoiser
from lcm.core.errors import UserError
from lcm.core.guidance import draw_w
from lcm.core.numbers import Count
from lcm.core.process import Flow, Process
from lcm.core.timesteps import POINTS, few_step_flow, points_of

Distance = Callable[[Tensor, Tensor], Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]  # scalar loss, values to log


class Pair(NamedTuple):
    """The two points that a loss compares, of the student (`online`) and of its target, `[B, C, H, W]`.

    end: the time of both points, `[B]`. start: the noisy end of their phase, `[B]`. x0: the student's clean latent,
    `[B, C, H, W]`. weight: the weight of each sample, `[B]`; None: equal weights.
    """

    online: Tensor
    target: Tensor
    x0: Tensor
    end: Tensor
    start: Tensor
    weight: Tensor | None = None


class Networks(NamedTuple):
    """The networks of a loss: the student (the paper's theta), its target (theta-), the teacher and the fake score.

    teacher: None unless the method distils. fake: None unless the method matches distributions.
    """

    online: Denoiser
    target: Denoiser
    teacher: Denoiser | None = None
    fake: Denoiser | None = None


@dataclass
class ConsistencyDraws:
    """The random draws of a step: eps `[B, C, H, W]`, index `[B]` into the trained timesteps, w `[B]`."""

    eps: Tensor
    index: Tensor
    w: Tensor


class ConsistencyObjective(nn.Module):
    """Subclasses define `pair`, the two points that the loss compares.

    process: the student's process. timesteps: the trained t, `[N]` int64 ascending. distance: the paper's d. w_min, w_max: the
    range of the guidance weight w, which is drawn uniformly. f: the consistency function. saved_steps: the number of sampling
    steps for which the saved scheduler of a flow student is exact.
    """

    sampler: ClassVar[str] = "consistency"  # a function of `lcm.core.sampling`
    # The classes of diffusers for VP and for flow.
    schedulers: ClassVar[tuple[str, str]] = ("LCMScheduler", "FlowMatchLCMScheduler")
    timesteps: Tensor

    def __init__(
        self,
        process: Process,
        *,
        timesteps: Tensor,
        distance: Distance,
        w_min: float = 0.0,
        w_max: float = 0.0,
        f: ConsistencyFn = consistency_fn,
        saved_steps: Count = 4,
    ) -> None:
        super().__init__()
        self.process, self.distance, self.w_min, self.w_max, self.f = process, distance, w_min, w_max, f
        self.saved_steps = saved_steps
        self.register_buffer("timesteps", timesteps, persistent=False)

    def draw(self, z0: Tensor, rng: torch.Generator) -> Any:
        """Draw eps ~ N(0, 1), the index n uniformly, and w ~ U[w_min, w_max]."""
        eps = torch.randn(z0.shape, generator=rng, device=z0.device)
        index = torch.randint(len(self.timesteps), (len(z0),), generator=rng, device=z0.device)
        return ConsistencyDraws(eps, index, draw_w(len(z0), self.w_min, self.w_max, rng))

    def loss(self, nets: Networks, batch: LatentBatch, draws: Any) -> Loss:
        """Return the loss, and values to log."""
        return self.distances(self.pair(nets, batch, draws))

    def pair(self, nets: Networks, batch: LatentBatch, draws: Any) -> Pair:
        """Return the two points that the loss compares."""
        raise NotImplementedError

    def distances(self, pair: Pair) -> Loss:
        """Return the mean distance, and values to log."""
        loss = self.distance(pair.online, pair.target).flatten(1).mean(1)
        if pair.weight is not None:
            loss = pair.weight * loss
        return loss.mean(), {"consistency_l2": (pair.online.detach() - pair.target).square().mean()}

    def compare(
        self, nets: Networks, cond: Condition, w: Tensor | None, far: tuple[Tensor, Tensor], near: tuple[Tensor, Tensor]
    ) -> Pair:
        """Return the pair `f_theta(z_t, w, c, t)` and `f_theta-(z_s, w, c, s)`. far: (z_t, t). near: (z_s, s)."""
        return self.make_pair(
            lambda: self.f(nets.online.bound(cond, w), *far, process=self.process),
            lambda: self.f(nets.target.bound(cond, w), *near, process=self.process),
            torch.full((len(far[0]),), self.process.t_min, device=far[0].device),
        )

    def make_pair(
        self,
        online: Callable[[], Tensor | Denoised],
        target: Callable[[], Tensor | Denoised],
        end: Tensor,
        start: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Pair:
        """Call the student and its target. The random state is restored between the calls, so their dropout masks are equal.

        online, target: return the point at `end`, or a `Denoised` that jumps there. start: None: the noisy end of the schedule.
        """
        with torch.no_grad(), torch.random.fork_rng([end.device] if end.device.type == "cuda" else []):
            near = target()
        far = online()
        points = [self.process.jump(*point, end) if isinstance(point, Denoised) else point for point in (far, near)]
        x0 = far.x0 if isinstance(far, Denoised) else far
        start = torch.full_like(end, self.process.num_timesteps - 1) if start is None else start
        return Pair(points[0], points[1], x0, end, start, weight)

    def advance(self, step: int, max_steps: int) -> None:
        """Adapt to the progress of the training before the update `step`. By default nothing changes."""

    def target_decay(self, decay: float) -> float:
        """Return the target network's current decay (mu). decay: the configured value."""
        return decay

    def sampling(self) -> dict[str, Any]:
        """Return the sampler's settings for `lcm.json`, as plain data."""
        # lcm.json holds the shift of the training: `few_step_flow` saves another one in the scheduler's config.
        shift = {"shift": self.process.shift} if isinstance(self.process, Flow) else {}
        return {"sampler": self.sampler, "points": points_of(self.timesteps, self.process.num_timesteps), **shift}

    def scheduler(self, prediction_type: str) -> tuple[str, dict[str, Any]]:
        """Return the class name and the config of the diffusers scheduler saved with a student."""
        if isinstance(self.process, Flow):
            return self.schedulers[1], {**self.process.config, **few_step_flow(self.process.shift, self.saved_steps)}
        points = self.sampling()["points"] or POINTS
        return self.schedulers[0], {
            **self.process.config,
            "prediction_type": prediction_type,
            "original_inference_steps": points,
        }


def stage_at(step: int, max_steps: int, stages: int) -> int:
    """Return the stage of an update, 0 to `stages - 1`. All stages are equally long.

    Raises UserError for several stages of a training without a number of steps.
    """
    if stages == 1:
        return 0
    if max_steps < 1:
        raise UserError(f"the {stages} stages of this method share trainer.max_steps={max_steps}: set a number of steps")
    return min(step * stages // max_steps, stages - 1)
