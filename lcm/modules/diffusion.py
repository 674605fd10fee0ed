"""The latent diffusion teacher."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lcm.core.batch import LatentBatch
from lcm.core.numbers import NonNegative
from lcm.core.objectives.denoising import draw
from lcm.modules.latent import LatentModule


class LatentDiffusion(LatentModule):
    """Denoising training of a UNet (Latent Diffusion, eq. 2); captions are dropped by the DataModule, per sample.

    objective: `lcm.core.objectives.denoising.denoising` or alike. offset_noise: see `draw`.
    """

    def __init__(self, *args: Any, objective: Callable[..., Any], offset_noise: NonNegative = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.offset_noise = objective, offset_noise

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        draws = self.draws(draw, batch.z0, batch_idx, schedule=self.schedule, offset_noise=self.offset_noise)
        loss, logs = self.objective(self.network(self.net), batch, draws, schedule=self.schedule)
        self.log_train(loss, logs, len(batch))
        return loss

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> None:
        draws = self.draws(draw, batch.z0, batch_idx, "val", schedule=self.schedule)
        loss, _ = self.objective(self.network(self.best_net), batch, draws, schedule=self.schedule)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
