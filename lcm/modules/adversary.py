"""A discriminator of images and its loss (PatchGAN, 1611.07004; hinge loss; VQGAN's adaptive weight, 2012.09841)."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm.core.numbers import Count, Positive, Whole
from lcm.modules.optimization import Opponent, OptimizerFactory, ScheduleFactory


class Adversary(Opponent):
    """Trains `network` to tell real from rebuilt by the hinge loss, and a generator to deceive it.

    network: `[B, ...] -> ` logits, one per sample or patch, high for real. weight: of the generator's term, as a share of the
    other terms' gradient at the generator's last layer. start: the training step from which both learn. The other arguments are
    those of `Optimization`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        weight: Positive = 0.5,
        start: Whole = 0,
    ) -> None:
        super().__init__(network, optimizer, lr_schedule)
        self.weight, self.start = weight, start

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -self.network(fake).float().mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return (F.relu(1 - self.network(real).float()).mean() + F.relu(1 + self.network(fake).float()).mean()) / 2

    def balanced(self, loss: Tensor, other: Tensor, last: Tensor, trainer: L.Trainer) -> Tensor:
        """Return the weight of the generator's `loss` that makes its gradient at `last` `weight` times that of `other`."""
        gradients = torch.stack([torch.autograd.grad(each, last, retain_graph=True)[0].float() for each in (other, loss)])
        if trainer.world_size > 1:  # the same weight on all ranks
            gradients = trainer.strategy.reduce(gradients, reduce_op="mean")
        size, own = gradients.flatten(1).norm(dim=1)
        return self.weight * (size / (own + 1e-4)).clamp(max=1e4)


class PatchDiscriminator(nn.Sequential):
    """Images `[B, 3, H, W]` -> logits `[B, 1, H/4 - 2, W/4 - 2]`, each of a patch of 34 px."""

    def __init__(self, channels: Count = 32) -> None:
        c = channels
        super().__init__(
            *(nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(c, 2 * c, 4, stride=2, padding=1, bias=False), nn.GroupNorm(8, 2 * c), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * c, 4 * c, 4, padding=1, bias=False), nn.GroupNorm(8, 4 * c), nn.LeakyReLU(0.2)),
            nn.Conv2d(4 * c, 1, 4, padding=1),
        )
