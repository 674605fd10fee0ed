"""Learning-rate schedules: `(optimizer, max_steps) -> LambdaLR`, stepped once per optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lcm.core.errors import UserError
from lcm.core.numbers import Share, Whole


def constant(optimizer: Optimizer, max_steps: int, *, warmup: Whole = 0) -> LambdaLR:
    """Return a schedule that is linear from 0 over `warmup` steps, then constant. The first step is above 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))


def cosine(optimizer: Optimizer, max_steps: int, *, warmup: Whole = 0, final: Share = 0.0) -> LambdaLR:
    """Return a schedule that is linear from 0 over `warmup` steps, then half a cosine down to `final` times the peak.

    The cosine ends at `max_steps`. Raises UserError if max_steps is below 1.
    """
    if max_steps < 1:
        raise UserError(f"model/lr_schedule=cosine ends at trainer.max_steps, which is {max_steps}: give 1 or more")

    def factor(step: int) -> float:
        progress = min(1.0, max(0, step - warmup) / max(1, max_steps - warmup))
        return min(1.0, (step + 1) / (warmup + 1)) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))

    return LambdaLR(optimizer, factor)
