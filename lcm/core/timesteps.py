"""Integer timesteps of training and sampling, with s < t. Timestep 0 is the (nearly) clean end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcm.core.errors import UserError
from lcm.core.numbers import Count, SkipSteps
from lcm.core.process import FLOOR, Flow, Process

POINTS = 50  # points of the released LCMs' grid


def grid(num_timesteps: int = 1000, *, points: Count = POINTS) -> Tensor:
    """Return `T/points * (1 .. points) - 1`, `[points]` int64 ascending: 19, 39, ..., 999 in released LCMs and diffusers."""
    if not 1 <= points <= num_timesteps:
        raise UserError(f"a grid of {points} points does not fit {num_timesteps} timesteps: use 1 to {num_timesteps}")
    if num_timesteps % points:
        raise UserError(
            f"{points} grid points do not divide {num_timesteps} timesteps: use a divisor, so that the grid ends at "
            f"t = {num_timesteps - 1}"
        )
    # device="cpu", because networks may be built on the meta device at the same time.
    return torch.arange(1, points + 1, device="cpu") * (num_timesteps // points) - 1


def points_of(timesteps: Tensor, num_timesteps: int = 1000) -> int | None:
    """Return the number of points if the timesteps are a `grid`, else None."""
    points = len(timesteps)
    is_grid = points > 0 and num_timesteps % points == 0 and timesteps.tolist() == grid(num_timesteps, points=points).tolist()
    return points if is_grid else None


def full(num_timesteps: int = 1000, *, skip_steps: SkipSteps = 20) -> Tensor:
    """Return every t = n + k of Algorithm 1 with n over the whole schedule, `[T - k]` int64."""
    return torch.arange(skip_steps, num_timesteps)


def karras(process: Process, *, points: int = 18, device: torch.device | None = None) -> Tensor:
    """Return at most `points` int64 ascending timesteps 0 .. T - 1, evenly spaced in `(sigma_t / alpha_t)^(1 / 7)`.

    This is the grid of Consistency Models (2206.00364, eq. 5), rounded to the nearest timesteps. Rounding may merge points.
    """
    if not 2 <= points <= process.num_timesteps:
        raise UserError(f"points={points} does not fit {process.num_timesteps} timesteps: use 2 to {process.num_timesteps}")
    t = torch.arange(process.num_timesteps, device=device)
    root = (process.sigma(t) / process.alpha(t).clamp_min(FLOOR)) ** (1 / 7)
    even = root[0] + (root[-1] - root[0]) * torch.arange(points, device=root.device) / (points - 1)
    return (root[None] - even[:, None]).abs().argmin(dim=1).unique()


def skip_pair(timesteps: Tensor, index: Tensor, skip_steps: int, t_min: int = 0) -> tuple[Tensor, Tensor]:
    """Return Algorithm 1's (t_{n+k}, t_n) for indices `[B]`: t = timesteps[index] and s = max(t - k, t_min)."""
    t = timesteps[index]
    return t, (t - skip_steps).clamp_min(t_min)


def neighbours(timesteps: Tensor, index: Tensor, t_min: int = 0) -> tuple[Tensor, Tensor]:
    """Return (t_{n+1}, t_n) of an ascending grid `[N - 1]`. The first timestep is preceded by t_min."""
    return timesteps[index], torch.nn.functional.pad(timesteps, (1, 0), value=t_min)[index]


def consistency_steps(
    steps: int, num_timesteps: int = 1000, *, points: int = POINTS, trained: Sequence[int] | None = None
) -> list[int]:
    """Return `steps` descending timesteps of the trained grid, starting at T - 1 (the rule of diffusers' LCMScheduler).

    trained: the ascending timesteps of the training, all above 0. None: `grid` with `points`.
    """
    times = grid(num_timesteps, points=points).tolist() if trained is None else trained
    if not 1 <= steps <= len(times):
        raise UserError(f"steps={steps} does not fit the {len(times)} points of the model's grid: use 1 to {len(times)}")
    return [times[-1 - len(times) * i // steps] for i in range(steps)]


def trailing_steps(steps: int, num_timesteps: int = 1000) -> list[int]:
    """Return `steps` evenly spaced descending timesteps, starting at T - 1 ("trailing" of 2305.08891)."""
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps={steps} does not fit the schedule: use 1 to {num_timesteps}")
    return [round(num_timesteps * (1 - i / steps)) - 1 for i in range(steps)]


def phase_edges(process: Process, phases: Count, points: int | None) -> Tensor:
    """Return the times at which the phases end, `[phases]` int64, ascending from the clean end.

    Sampling makes one step in each phase: from T - 1 or from an end, to the next lower end. points: the number of points of the
    trained `grid`; None: the trained timesteps are no grid, which is a UserError.
    """
    if phases == 1:
        return torch.tensor([process.t_min])
    if points is None:
        raise UserError("phases end at points of a grid: set model/timesteps=grid")
    if isinstance(process, Flow):
        starts = trailing_steps(phases, process.num_timesteps)
    else:
        starts = consistency_steps(phases, process.num_timesteps, points=points)
    return torch.tensor([process.t_min, *reversed(starts[1:])])


def phase_end(t: Tensor, edges: Tensor) -> Tensor:
    """Return the largest of the ascending `edges` below t `[B]`: the end of the phase of t."""
    return edges[torch.searchsorted(edges, t) - 1]


def phase_start(t: Tensor, edges: Tensor, last: int) -> Tensor:
    """Return the smallest of the ascending `edges` from t `[B]` up, or `last`: the noisy end of the phase of t."""
    return torch.nn.functional.pad(edges, (0, 1), value=last)[torch.searchsorted(edges, t)]


def few_step_flow(shift: float, steps: int, num_timesteps: int = 1000) -> dict[str, float]:
    """Return the config for which diffusers' flow schedulers use `trailing_steps(steps)` of `Flow(shift)`.

    The config is exact for this number of steps only. diffusers' grid is linear from 1 to sigma_min, shifted (a second time at
    sigma_min) and stretched to `shift_terminal`. Shifts and stretches are Moebius maps with fixed point 1. One shift and one
    terminal value therefore reproduce `trailing_steps` exactly.
    """
    if steps == 1:
        return {"shift": shift}
    inner, g = shift, 1 / num_timesteps
    for _ in range(100):  # fixed-point iteration: sigma_min depends on the inner shift
        sigma_min = inner * g / (1 + (inner - 1) * g)
        k = (1 - sigma_min) * steps / (steps - 1)
        inner = k * shift / (k * shift - shift + 1)
    return {"shift": inner, "shift_terminal": shift / (steps + shift - 1)}
