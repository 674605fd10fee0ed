"""Adversaries of a training: discriminators of images and of latents, and their hinge loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm.core.errors import UserError
from lcm.core.numbers import Count, Positive, Whole
from lcm.core.objectives.consistency import Pair
from lcm.core.process import Process
from lcm.models.families import Family
from lcm.modules.optimization import Opponent, OptimizerFactory, ScheduleFactory


class Adversary(Opponent):
    """A discriminator `network` and the hinge losses of its game with a generator.

    network: `[B, ...] -> ` logits, one per sample or patch, high for real; or a list of logits of equal weight. weight: the
    weight of the generator's loss. start: the training step from which discriminator and generator learn from each other. The
    other arguments are those of `Optimization`.
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

    def generator_loss(self, fake: Any) -> Tensor:
        """Return the loss by which the generator deceives the network. fake: the network's input, with gradients."""
        return self.mean_loss(lambda logits: -logits, fake)

    def discriminator_loss(self, real: Any, fake: Any) -> Tensor:
        """Return the loss by which the network tells real inputs from fake ones."""
        return (
            self.mean_loss(lambda logits: F.relu(1 - logits), real) + self.mean_loss(lambda logits: F.relu(1 + logits), fake)
        ) / 2

    def mean_loss(self, loss: Callable[[Tensor], Tensor], x: Any) -> Tensor:
        logits = self.network(x)
        return torch.stack([loss(part.float()).mean() for part in (logits if isinstance(logits, list) else [logits])]).mean()

    def balanced_weight(self, loss: Tensor, other: Tensor, last: Tensor, trainer: L.Trainer) -> Tensor:
        """Return VQGAN's adaptive weight of the generator's `loss` (2012.09841).

        The gradient of the weighted loss at `last`, the last layer, is `self.weight` times as large as that of `other`.
        """
        gradients = torch.stack([torch.autograd.grad(value, last, retain_graph=True)[0].float() for value in (other, loss)])
        if trainer.world_size > 1:  # the same weight on all ranks
            gradients = trainer.strategy.reduce(gradients, reduce_op="mean")
        other_norm, norm = gradients.flatten(1).norm(dim=1)
        return self.weight * (other_norm / (norm + 1e-4)).clamp(max=1e4)


class PatchDiscriminator(nn.Sequential):
    """Images `[B, 3, H, W]` -> logits `[B, 1, H/4 - 2, W/4 - 2]`, each of a patch of 34 px (PatchGAN, 1611.07004)."""

    def __init__(self, channels: Count = 32) -> None:
        c = channels
        super().__init__(
            *(nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(c, 2 * c, 4, stride=2, padding=1, bias=False), nn.GroupNorm(8, 2 * c), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * c, 4 * c, 4, padding=1, bias=False), nn.GroupNorm(8, 4 * c), nn.LeakyReLU(0.2)),
            nn.Conv2d(4 * c, 1, 4, padding=1),
        )


@dataclass
class RenoisingDraws:
    """The noise of real and of fake latents, `[B, C, H, W]` each, and share `[B]` in [0, 1), which selects the time t."""

    real: Tensor
    fake: Tensor
    share: Tensor


class LatentAdversary(Adversary):
    """Judges noised latents in the features of the frozen teacher (PCM, 2405.18407; LADD, 2403.12015).

    The fake latent is the student's point at the end of its phase, noised up to a random time of the phase.
    blocks: the channels of the features of each block. real: the real latent, noised up to the same time: "target" for the
    target's point (PCM), or "data" (LADD). channels: the channels of the heads. The other arguments are those of `Adversary`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        weight: Positive = 0.1,
        start: Whole = 0,
        real: Literal["target", "data"] = "target",
        channels: Count = 64,
    ) -> None:
        super().__init__(Heads(blocks, channels), optimizer=optimizer, lr_schedule=lr_schedule, weight=weight, start=start)
        self.real = real

    def draw(self, z0: Tensor, rng: torch.Generator) -> RenoisingDraws:
        """Draw the noise of real and fake latents, and the share. z0: gives the shape `[B, C, H, W]`."""
        real, fake = (torch.randn(z0.shape, generator=rng, device=z0.device) for _ in range(2))
        return RenoisingDraws(real, fake, torch.rand(len(z0), generator=rng, device=z0.device))

    def renoised(self, pair: Pair, z0: Tensor, draws: RenoisingDraws, process: Process) -> tuple[Tensor, Tensor, Tensor]:
        """Return real and fake latents at the time t `[B]`, and t, which is uniform from the end of the phase to its start."""
        t = pair.end + (draws.share * (pair.start - pair.end + 1)).long()
        fake = process.renoise(pair.online, pair.end, t, draws.fake)
        if self.real == "data":
            return process.jump(z0, draws.real, t), fake, t
        return process.renoise(pair.target, pair.end, t, draws.real), fake, t


def latent_adversary(adversary: Callable[..., LatentAdversary] | None, family: Family, net: Any) -> LatentAdversary | None:
    """Build an adversary for the features of `net`; None: none. Raises UserError for an adversary that judges images."""
    if isinstance(adversary, Adversary):
        raise UserError("model/adversary=patch judges images: use model/adversary=latent")
    return None if adversary is None else adversary([width for _, width in family.feature_blocks(net)])


class Heads(nn.Module):
    """Features `[B, C, N]` of several blocks -> a list of logits `[B, 1, N]`, one for each block.

    blocks: the channels of each block's features. channels: the channels of the hidden layer.
    """

    def __init__(self, blocks: Sequence[int], channels: Count = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(nn.GroupNorm(1, width), nn.Conv1d(width, channels, 1), nn.LeakyReLU(0.2)),
                *(nn.GroupNorm(1, channels), nn.Conv1d(channels, 1, 1)),
            )
            for width in blocks
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]
