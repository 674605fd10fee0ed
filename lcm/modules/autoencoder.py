"""The KL autoencoder of a latent diffusion pipeline (Latent Diffusion, 2112.10752, section 3.1)."""

from functools import partial
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lcm.core.errors import UserError
from lcm.core.numbers import Positive, Seed, Whole
from lcm.core.random import RankSlice, normal
from lcm.models.saving import save_network
from lcm.modules.adversary import Adversary
from lcm.modules.checkpoint import check_tensors
from lcm.modules.optimization import Optimization, OptimizerFactory, ScheduleFactory, log_train
from lcm.modules.perceptual import Perceptual


class Autoencoder(L.LightningModule):
    """Trains `vae` to rebuild pixels: L1 + squared error + kl_weight * KL(q(z|x) || N(0, I)) + the two terms below.

    perceptual: a distance of images in the features of a frozen network. adversary: a discriminator of images, trained in the
    same steps. freeze_encoder: train the decoder only, so that the latents do not change. The other arguments are those of
    `Optimization`.
    """

    latent_std: Tensor

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        kl_weight: float = 1e-6,
        perceptual: Perceptual | None = None,
        adversary: Adversary | None = None,
        freeze_encoder: bool = False,
        clip_norm: Positive | None = 1.0,
        skip_non_finite: Whole = 0,
        seed: Seed = 0,
    ) -> None:
        if adversary is not None and not isinstance(adversary, Adversary):
            raise UserError("model/adversary=latent judges latents: use model/adversary=patch")
        super().__init__()
        self.vae, self.kl_weight, self.seed = vae, kl_weight, seed
        self.adversary, self.freeze_encoder = adversary, freeze_encoder
        # A plain dict: not in the state dict, DDP or the optimizer.
        self.frozen = {} if perceptual is None else {"perceptual": perceptual.requires_grad_(False).eval()}
        if freeze_encoder:
            for part in filter(None, (vae.encoder, vae.quant_conv)):
                part.requires_grad_(False)
        self.optimization = Optimization(optimizer, lr_schedule, clip_norm, skip_non_finite, [adversary] if adversary else [])
        self.register_buffer("latent_std", torch.ones(()))
        self.register_load_state_dict_pre_hook(check_tensors)

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.optimization]

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return self.optimization.configure([{"params": trained}], self.trainer.max_steps)

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x = batch["x"]
        posterior = self.vae.encode(x).latent_dist
        keys = (self.seed, "train", batch_idx)
        rows = RankSlice(self.device, *keys, rank=self.global_rank, world_size=self.trainer.world_size)
        noise = normal(posterior.mean.shape, rows, self.device)
        rebuilt = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = rebuilt - x
        kl = posterior.kl().float().mean()
        logs = {"psnr": psnr(error), "kl": kl}
        loss = error.abs().mean() + error.square().mean()
        for perceptual in self.frozen.values():
            logs["perceptual"] = perceptual(x, rebuilt, batch_idx)
            loss = loss + perceptual.weight * logs["perceptual"]
        adversary = self.adversary
        if adversary is not None and self.global_step >= adversary.start:
            logs["adversarial"] = adversary.generator_loss(rebuilt)
            weight = adversary.balanced_weight(logs["adversarial"], loss, self.vae.decoder.conv_out.weight, self.trainer)
            loss = loss + weight * logs["adversarial"]
            judged = partial(adversary.discriminator_loss, x, rebuilt.detach())
            logs["discriminator"] = adversary.learn(judged, 1 / self.trainer.accumulate_grad_batches)
        loss = loss + self.kl_weight * kl
        log_train(self, loss, logs, len(x))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._validated: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        z = self.vae.encode(batch["x"]).latent_dist.mean
        error = self.vae.decode(z).sample.float().clamp(-1, 1) - batch["x"]
        self.log("val/psnr", psnr(error), prog_bar=True, batch_size=len(z))
        self._validated.append((z.float().mean(), z.float().square().mean()))

    def on_validation_epoch_end(self) -> None:
        mean, square = (torch.stack(values).mean() for values in zip(*self._validated, strict=True))
        self.latent_std.copy_((square - mean**2).sqrt())

    @rank_zero_only
    def save_model(self, folder: str) -> None:
        """Write `folder/vae`. A new scaling factor gives the latents unit variance, unless the encoder is frozen."""
        if not self.freeze_encoder:
            self.vae.register_to_config(scaling_factor=round(1 / float(self.latent_std), 5))
        save_network(f"{folder}/vae", self.vae)


def psnr(error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, the mean over images. error: `[B, C, H, W]`, of pixels in [-1, 1]."""
    return (10 * torch.log10(4 / error.square().flatten(1).mean(1).clamp_min(1e-10))).mean()
