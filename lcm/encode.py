"""Images encoded once: `python -m lcm.encode data=shards data.shards='a/*.tar' data.codec.pipeline=<folder> out=latents`."""

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from omegaconf import DictConfig
from torch.utils.data import DataLoader
from tqdm import tqdm

from lcm.command_line import build, output_folder, pick_device, program
from lcm.data.codec import LatentCodec
from lcm.data.datamodule import ShardDataModule, one_thread
from lcm.data.latents import LATENT, STAMP, stamp
from lcm.data.members import Sample
from lcm.data.order import Order
from lcm.data.shards import CAPTIONS
from lcm.data.source import Source
from lcm.data.stream import ShardStream
from lcm.data.transforms import Decode
from lcm.errors import UserError


@dataclass
class Variants:
    """`sample -> {"x": uint8 [V, 3, S, S], "members"}`: crops and mirrored copies of one image, and its texts as they are."""

    decode: Decode
    crops: int
    flip: bool

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        x = torch.stack([self.decode(sample, rng)["x"] for _ in range(self.crops)])
        texts = {name: sample[name] for name in CAPTIONS if name in sample}
        return {"x": torch.cat([x, x.flip(-1)]) if self.flip else x, "members": {"__key__": sample["__key__"], **texts}}


def gathered(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"x": torch.stack([sample["x"] for sample in samples]), "members": [sample["members"] for sample in samples]}


def encode_shard(source: Source, codec: LatentCodec, decode: Variants, target: Path, data: ShardDataModule, bar: tqdm) -> None:
    """One shard of images -> one of latents, which appears in one rename; `<stem>_stats.json` beside it says it is done."""
    [facts], skipped, written = source.facts(), Counter[str](), 0
    order, size = Order([facts.samples]), data.val_batch_size
    stream = ShardStream([source], order, decode=decode, collate=gathered, batch_size=size, seed=data.seed, stop=order.size)
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file, wds.TarWriter(file, mtime=0) as writer:
        for batch in DataLoader(stream, batch_size=None, num_workers=data.num_workers, worker_init_fn=one_thread):
            moments = codec.posterior(batch["x"].flatten(0, 1).to(codec.device), []).unflatten(0, batch["x"].shape[:2])
            for members, variants in zip(batch["members"], moments.half().cpu().numpy(), strict=True):
                writer.write({**members, LATENT: npy(variants)})
            skipped.update(batch["skipped"])
            written += len(moments)
            bar.update(len(moments))
    partial.rename(target)
    stats = {"successes": written, "skipped": dict(skipped), "left_out": facts.dropped, "source": source.urls[0]}
    Path(f"{target.with_suffix('')}_stats.json").write_text(json.dumps(stats, indent=2))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def claim(folder: Path, made_with: dict[str, Any]) -> None:
    """Note what the folder's latents are made with. Raises UserError if it holds others."""
    file = folder / STAMP
    if file.is_file() and json.loads(file.read_text()) != made_with:
        raise UserError(f"{folder} holds latents of another VAE, size or crop: give out another folder, or remove it")
    file.write_text(json.dumps(made_with, indent=2))


@program("encode")
@torch.inference_mode()
def main(cfg: DictConfig) -> None:
    """Encode what is not encoded yet; stopped at any moment, the same command goes on."""
    folder, device = output_folder(cfg.out), pick_device(cfg.device)
    data: ShardDataModule = build(cfg.data)
    if data.codec is None:
        raise UserError("encoding needs a VAE: choose data with a codec, such as data=shards or data=openmoji")
    if data.buckets:
        raise UserError("latents are encoded at one shape: set data.buckets=null")
    data.prepare_data()
    codec = data.codec.to(device)
    claim(folder, {**stamp(codec.vae, data.resolution), "crops": cfg.crops, "flip": cfg.flip})
    sources = [(url, source) for source in (*data.train_sources, *data.val_sources) for url in source.urls]
    targets = [folder / Path(url).name for url, _ in sources]
    if twice := [target.name for target, count in Counter(targets).items() if count > 1]:
        raise UserError(f"several shards are called {twice[0]}: encode them into different folders")
    decode = Variants(Decode(data.resolution, random_crop=cfg.crops > 1), cfg.crops, cfg.flip)
    mine = list(zip(targets, sources, strict=True))[cfg.rank :: cfg.world_size]
    left = [
        (target, url, source) for target, (url, source) in mine if not Path(f"{target.with_suffix('')}_stats.json").is_file()
    ]
    with tqdm(desc="encoding", unit="image", disable=not left) as bar:
        for number, (target, url, source) in enumerate(left):
            bar.set_postfix_str(f"shard {number + 1} of {len(left)}")
            one = Source([url], needs=source.needs, filters=source.filters, cache=source.cache, index=source.index)
            encode_shard(one, codec, decode, target, data, bar)
    print(f"latents: {folder}   ({len(targets)} shards, {len(left)} of them new)\n"
          f"next:    python train.py data=latents data.shards='{folder}/<shards>.tar'")  # fmt: skip


if __name__ == "__main__":
    main()
