"""Terms of a student's loss besides its objective: the loss of an adversary, and a reward."""

from typing import Any

import torch
from torch import Tensor, nn

from lcm.core.batch import LatentBatch
from lcm.core.denoiser import Condition
from lcm.core.objectives.consistency import Pair
from lcm.models.features import block_features
from lcm.models.pipeline import load_vae
from lcm.modules.adversary import LatentAdversary
from lcm.modules.latent import LatentModule


def reward_parts(reward: nn.Module | None, pipeline: str) -> dict[str, nn.Module]:
    """Return the frozen networks of a reward: the reward and the VAE of the pipeline, which decodes the student's latents."""
    return {} if reward is None else {"reward": reward, "vae": load_vae(pipeline)}


def further_terms(module: LatentModule, pair: Pair, batch: LatentBatch, batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the adversary's and the reward's terms, and values to log."""
    total, logs = torch.zeros((), device=module.device), dict[str, Tensor]()
    if module.adversary is not None and module.global_step >= module.adversary.start:
        total, logs = adversarial_term(module, module.adversary, pair, batch, batch_idx)
    if (reward := module.frozen.get("reward")) is not None and pair.x0.requires_grad:
        term, values = reward_term(module, reward, pair.x0, batch.captions)
        total, logs = total + term, {**logs, **values}
    return total, logs


def adversarial_term(
    module: LatentModule, adversary: LatentAdversary, pair: Pair, batch: LatentBatch, batch_idx: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the student's adversarial term and values to log. The adversary learns from the same latents."""
    draws = module.draws(adversary.draw, batch.z0, batch_idx, "adversary")
    real, fake, t = adversary.renoised(pair, batch.z0, draws, module.process)
    with torch.no_grad():
        real_features = teacher_features(module, real, t, batch.cond)
    fake_features = teacher_features(module, fake, t, batch.cond)
    term = adversary.generator_loss(fake_features)
    detached = [feature.detach() for feature in fake_features]
    loss = adversary.learn(lambda: adversary.discriminator_loss(real_features, detached), module.share)
    return adversary.weight * term, {"adversarial": term.detach(), "discriminator": loss}


def teacher_features(module: LatentModule, z_t: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
    """Return the features `[B, C, N]` of the teacher's blocks at z_t and t."""
    teacher = module.frozen["teacher"]
    network = module.network(teacher, compiled=False)
    return block_features(module.family, teacher, lambda: network(z_t, module.process.network_time(t), cond))


def reward_term(module: LatentModule, reward: Any, x0: Tensor, captions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the term that raises the reward of the decoded x0, and values to log."""
    vae: Any = module.frozen["vae"]
    shift, scale = module.family.latent_scaling(vae)
    images = vae.decode((x0 / scale + shift).to(vae.dtype)).sample.float()
    value = reward(((images + 1) / 2).clamp(0, 1), captions).mean()
    return -reward.weight * value, {"reward": value.detach()}
