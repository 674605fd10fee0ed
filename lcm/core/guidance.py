"""Classifier-free guidance with the paper's w: guided = cond + w (cond - uncond). diffusers' guidance_scale is w + 1."""

import math

import torch
from torch import Tensor

from lcm.core.errors import UserError
from lcm.core.process import per_sample

W_DIM = 256  # width of the embedding of w in released models


def guide(cond: Tensor, uncond: Tensor, w: Tensor) -> Tensor:
    """Return `(1 + w) cond - w uncond` (LCM, eq. 6). cond, uncond: `[B, ...]`. w: `[B]`; 0 gives the conditional prediction."""
    return cond + per_sample(w, cond.ndim) * (cond - uncond)


def draw_w(count: int, w_min: float, w_max: float, rng: torch.Generator) -> Tensor:
    """Draw w ~ U[w_min, w_max], `[count]`."""
    return w_min + (w_max - w_min) * torch.rand(count, generator=rng, device=rng.device)


def check_w_range(w_min: float, w_max: float) -> None:
    """Raise UserError unless 0 <= w_min <= w_max."""
    if not 0 <= w_min <= w_max:
        raise UserError(
            f"model.w_min={w_min} and model.w_max={w_max} are not a range of guidance weights: set 0 <= w_min <= w_max"
        )


def embed_w(w: Tensor, dim: int = W_DIM) -> Tensor:
    """Return the sinusoidal embedding `[B, dim]` float32 of w `[B]`: [sin, cos] of 1000 w at dim/2 frequencies, 1 to 1e-4.

    The embedding is float32 in every training precision, because its phases reach 14000 radians.
    """
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=w.device, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    phase = 1000.0 * w.float()[:, None] * frequency
    return torch.nn.functional.pad(torch.cat([phase.sin(), phase.cos()], dim=1), (0, dim % 2))
