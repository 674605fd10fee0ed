"""What consistency objectives share: the draws of a step and the consistency loss between two points of a path.

An objective is `(nets, batch, draws, *, schedule, timesteps, distance) -> (loss, logs)`, of a distillation also with `solver`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm.core.condition import Condition
from lcm.core.consistency import ConsistencyFn, consistency_fn
from lcm.core.guidance import draw_w
from lcm.core.networks import Networks, conditioned
from lcm.core.schedule import NoiseSchedule

Distance = Callable[[Tensor, Tensor], Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]  # a scalar to minimise, and what to log beside it
Objective = Callable[..., Loss]


@dataclass
class ConsistencyDraws:
    """The randomness of a step: eps `[B, C, H, W]`, index `[B]` into the trained timesteps, w `[B]`."""

    eps: Tensor
    index: Tensor
    w: Tensor


def draw(z0: Tensor, rng: torch.Generator, *, timesteps: Tensor, w_min: float, w_max: float) -> ConsistencyDraws:
    """eps ~ N(0, 1), n uniform, w ~ U[w_min, w_max]."""
    eps = torch.randn(z0.shape, generator=rng, device=z0.device)
    index = torch.randint(len(timesteps), (len(z0),), generator=rng, device=z0.device)
    return ConsistencyDraws(eps, index, draw_w(len(z0), w_min, w_max, rng))


def consistency_loss(
    nets: Networks,
    cond: Condition,
    w: Tensor | None,
    far: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
    *,
    schedule: NoiseSchedule,
    distance: Distance,
    f: ConsistencyFn = consistency_fn,
) -> Loss:
    """`d(f_theta(z_t, w, c, t), f_theta-(z_s, w, c, s))` for far = (z_t, t) and near = (z_s, s); mean over the batch.

    The target comes first. The random state is then put back: networks in one mode draw the same dropout mask.
    """
    device = far[0].device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        target = f(conditioned(nets.target, cond, schedule, w), *near)
    pred = f(conditioned(nets.online, cond, schedule, w), *far)
    loss = distance(pred, target).flatten(1).mean(1)
    return loss.mean(), {"consistency_l2": (pred.detach() - target).square().mean()}
