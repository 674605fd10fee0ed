"""The peers: the data loader and the training step of diffusers' scripts for latent consistency distillation."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from lcm.core.denoiser import Condition, Denoiser, Network
from lcm.core.random import generator
from lcm.models.codec import LatentCodec
from lcm.models.student import as_network
from lcm.modules.consistency import ConsistencyModule

READING = (tar_file_expander, group_by_keys)  # the stages of wds.tarfile_to_samples after opening


def as_tensor(image: Image.Image, size: int) -> Tensor:
    """Return an image as `[3, size, size]` in [-1, 1], as torchvision: shorter side resized bilinearly, cropped at random."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BILINEAR)
    left = int(torch.randint(image.width - size + 1, ()))
    top = int(torch.randint(image.height - size + 1, ()))
    image = image.crop((left, top, left + size, top + size))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return (x - 0.5) / 0.5


def image_loader(
    shards: str | list[str], *, size: int, batch_size: int, workers: int, captions: dict[str, float] | None = None
) -> Iterator[Any]:
    """Return endless batches of (pixels `[B, 3, size, size]` float32, captions). captions: the weight of each caption field."""
    fields, weights = zip(*(captions or {"txt": 1.0}).items(), strict=True)

    def with_text(sample: dict[str, Any]) -> dict[str, Any]:
        field = random.choices(fields, weights)[0]
        return {**sample, "text": sample["txt"] if field == "txt" else sample["json"][field]}

    stages = [wds.decode("pilrgb"), wds.map(with_text), wds.rename(image="jpg;png;webp"), wds.to_tuple("image", "text")]
    return _loader(shards, [*stages, wds.map_tuple(lambda image: as_tensor(image, size))], batch_size, workers)


def latent_loader(shard: str, *, batch_size: int, workers: int) -> Iterator[Any]:
    """Return endless batches of (moments, captions), decoded by webdataset."""
    stages = [wds.decode(), wds.to_tuple("latent.npy", "txt"), wds.map_tuple(torch.from_numpy)]
    return _loader(shard, stages, batch_size, workers)


def open_local(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the shards with an open stream of a local file. webdataset's own opener refuses paths in its secure mode."""
    for shard in shards:
        with open(shard["url"], "rb") as stream:
            yield {**shard, "stream": stream}


def _loader(shards: str | list[str], stages: list[Any], batch_size: int, workers: int) -> Iterator[Any]:
    batches = wds.batched(batch_size, partial=False, collation_fn=torch.utils.data.default_collate)
    pipeline = wds.DataPipeline(
        wds.ResampledShards([shards] if isinstance(shards, str) else shards),
        open_local,
        *READING,
        wds.shuffle(100),
        *stages,
        batches,
    )
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))


def distillation_step(
    module: ConsistencyModule, codec: LatentCodec, dtype: torch.dtype, lr: float = 1e-6
) -> Callable[..., float]:
    """Return `(pixels, captions) -> loss`, an update of the module's student with the module's loss, as in the peers' script.

    Each step encodes images and captions, calls the float32 teacher twice, with and without the caption, and reads the loss.
    AdamW is not fused, and the target is updated tensor by tensor. dtype: the dtype of autocast; float32 turns autocast off.
    """
    assert module.target_net is not None
    net, target, rng = module.net, module.target_net, generator(module.device, "peers")
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    teacher = two_passes(as_network(module.family, module.frozen["teacher"]))
    networks = module.denoisers(net)._replace(teacher=Denoiser(teacher, module.process, module.teacher_prediction_type))

    def step(pixels: Tensor, captions: list[str]) -> float:
        batch = codec.encode({"x": pixels.to(module.device), "captions": captions, "keys": captions}, rng)
        draws = module.objective.draw(batch.z0, rng)
        with torch.autocast(module.device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = module.objective.loss(networks, batch, draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), module.optimization.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for average, online in zip(target.parameters(), net.parameters(), strict=True):
            average.detach().mul_(module.ema_decay).add_(online.detach(), alpha=1 - module.ema_decay)
        return loss.item()

    return step


def two_passes(teacher: Network) -> Network:
    """Return a network that splits a doubled batch into two passes of the teacher."""

    def net(z: Tensor, t: Tensor, cond: Condition, w: Tensor | None = None) -> Tensor:
        halves = ((z.chunk(2)[i], t.chunk(2)[i], {name: part.chunk(2)[i] for name, part in cond.items()}) for i in (0, 1))
        return torch.cat([teacher(*half, None) for half in halves])

    return net
