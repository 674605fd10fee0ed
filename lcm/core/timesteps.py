"""Which timesteps are trained and sampled. Timesteps are integers everywhere; s < t; 0 is the (nearly) clean end."""

import torch
from torch import Tensor

from lcm.errors import UserError


def grid(num_timesteps: int = 1000, *, points: int = 50) -> Tensor:
    """`[points]` int64 ascending T/points * (1 .. points) - 1: 19, 39, ..., 999, as the released LCMs and diffusers use."""
    if not 1 <= points <= num_timesteps:
        raise UserError(f"a grid of {points} points does not fit {num_timesteps} timesteps: use 1 to {num_timesteps}")
    if num_timesteps % points:
        raise UserError(
            f"{points} grid points do not divide {num_timesteps} timesteps, so t = {num_timesteps - 1} would be lost"
        )
    return torch.arange(1, points + 1) * (num_timesteps // points) - 1


def full(num_timesteps: int = 1000, *, skip_steps: int = 20) -> Tensor:
    """`[T - k]` int64: every t = n + k that Algorithm 1 draws with n over the whole schedule."""
    return torch.arange(skip_steps, num_timesteps)


def skip_pair(timesteps: Tensor, index: Tensor, skip_steps: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1's (t_{n+k}, t_n) for drawn indices `[B]`: t = timesteps[index], s = t - k, not below 0."""
    t = timesteps[index]
    return t, (t - skip_steps).clamp_min(0)


def consistency_steps(steps: int, num_timesteps: int = 1000, *, points: int = 50) -> list[int]:
    """`steps` descending timesteps of the trained grid, from T - 1 on (the rule of diffusers' LCMScheduler)."""
    times = grid(num_timesteps, points=points).flip(0)
    if not 1 <= steps <= points:
        raise UserError(f"steps={steps} does not fit the {points} points of the model's grid: use 1 to {points}")
    return [int(times[points * i // steps]) for i in range(steps)]


def trailing_steps(steps: int, num_timesteps: int = 1000) -> list[int]:
    """`steps` evenly spaced descending timesteps from T - 1 on (2305.08891's "trailing", right for few steps)."""
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps={steps} does not fit the schedule: use 1 to {num_timesteps}")
    return [round(num_timesteps * (1 - i / steps)) - 1 for i in range(steps)]
