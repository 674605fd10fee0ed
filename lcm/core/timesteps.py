"""Which timesteps are trained and sampled. Timesteps are integers everywhere; s < t; 0 is the (nearly) clean end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcm.core.numbers import Count, SkipSteps
from lcm.core.schedule import NoiseSchedule
from lcm.errors import UserError

POINTS = 50  # of the grid that the released LCMs were trained on


def grid(num_timesteps: int = 1000, *, points: Count = POINTS) -> Tensor:
    """`[points]` int64 ascending T/points * (1 .. points) - 1: 19, 39, ..., 999, as the released LCMs and diffusers use."""
    if not 1 <= points <= num_timesteps:
        raise UserError(f"a grid of {points} points does not fit {num_timesteps} timesteps: use 1 to {num_timesteps}")
    if num_timesteps % points:
        raise UserError(
            f"{points} grid points do not divide {num_timesteps} timesteps, so t = {num_timesteps - 1} would be lost"
        )
    return torch.arange(1, points + 1) * (num_timesteps // points) - 1


def points_of(timesteps: Tensor, num_timesteps: int = 1000) -> int | None:
    """How many points `grid` was asked for; None for timesteps that are no grid."""
    points = len(timesteps)
    is_grid = points > 0 and num_timesteps % points == 0 and timesteps.tolist() == grid(num_timesteps, points=points).tolist()
    return points if is_grid else None


def full(num_timesteps: int = 1000, *, skip_steps: SkipSteps = 20) -> Tensor:
    """`[T - k]` int64: every t = n + k that Algorithm 1 draws with n over the whole schedule."""
    return torch.arange(skip_steps, num_timesteps)


def karras(schedule: NoiseSchedule, *, points: int = 18) -> Tensor:
    """At most `points` int64 ascending timesteps 0 .. T - 1, evenly spaced in `(sigma_t / alpha_t)^(1 / 7)`.

    Those of Consistency Models (2206.00364, eq. 5), at the schedule's nearest integers.
    """
    if not 2 <= points <= schedule.num_timesteps:
        raise UserError(f"points={points} does not fit {schedule.num_timesteps} timesteps: use 2 to {schedule.num_timesteps}")
    root = (schedule.sigma / schedule.alpha) ** (1 / 7)
    wanted = root[0] + (root[-1] - root[0]) * torch.arange(points, device=root.device) / (points - 1)
    return (root[None] - wanted[:, None]).abs().argmin(dim=1).unique()


def skip_pair(timesteps: Tensor, index: Tensor, skip_steps: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1's (t_{n+k}, t_n) for drawn indices `[B]`: t = timesteps[index], s = t - k, not below 0."""
    t = timesteps[index]
    return t, (t - skip_steps).clamp_min(0)


def neighbours(timesteps: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(t_{n+1}, t_n) of a grid: t = timesteps[index] and the timestep before it, 0 before the first; ascending `[N - 1]`."""
    return timesteps[index], torch.nn.functional.pad(timesteps, (1, 0))[index]


def consistency_steps(
    steps: int, num_timesteps: int = 1000, *, points: int = POINTS, trained: Sequence[int] | None = None
) -> list[int]:
    """`steps` descending timesteps of the trained grid, from T - 1 on (the rule of diffusers' LCMScheduler).

    trained: the ascending timesteps above 0 that a model was trained at, if not `grid`'s.
    """
    times = grid(num_timesteps, points=points).tolist() if trained is None else trained
    if not 1 <= steps <= len(times):
        raise UserError(f"steps={steps} does not fit the {len(times)} points of the model's grid: use 1 to {len(times)}")
    return [times[-1 - len(times) * i // steps] for i in range(steps)]


def trailing_steps(steps: int, num_timesteps: int = 1000) -> list[int]:
    """`steps` evenly spaced descending timesteps from T - 1 on (2305.08891's "trailing", right for few steps)."""
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps={steps} does not fit the schedule: use 1 to {num_timesteps}")
    return [round(num_timesteps * (1 - i / steps)) - 1 for i in range(steps)]
