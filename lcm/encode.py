"""Images encoded once: `python -m lcm.encode data=shards data.shards='a/*.tar' data.codec.pipeline=<folder> out=latents`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count, Seed

program = Program("encode", out=str, crops=Count, flip=bool, sample=bool, text=bool, seed=Seed)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from omegaconf import DictConfig
from tqdm import tqdm

from lcm.app.inputs import output_folder, pick_device
from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.encoding import Encoder, Variants, gathered
from lcm.data.latents import STAMP, stamp
from lcm.data.order import Order
from lcm.data.source import Source
from lcm.data.stream import ShardStream
from lcm.data.transforms import Decode
from lcm.data.workers import Loader, workers_watched
from lcm.runtime.atomic_io import whole_file
from lcm.runtime.redaction import redacted


def encode_shard(source: Source, encoder: Encoder, decode: Variants, target: Path, data: ShardDataModule, bar: tqdm) -> None:
    """One shard of images -> one of latents, which appears whole; `<stem>_stats.json` beside it then says it is done."""
    [facts], skipped, written = source.facts(), Counter[str](), 0
    order, seed, size = Order([facts.samples]), f"{data.seed}/{target.name}", data.val_batch_size
    stream = ShardStream([source], order, decode=decode, collate=gathered, batch_size=size, seed=seed, stop=order.size)
    with whole_file(target) as file, wds.TarWriter(file, mtime=0) as writer:
        for batch in Loader(stream, num_workers=data.num_workers, patience=data.timeout):
            for sample in encoder(batch, target.name):
                writer.write(sample)
            skipped.update(batch["skipped"])
            written += len(batch["members"])
            bar.update(len(batch["members"]))
    facts_of = {"successes": written, "skipped": dict(skipped), "left_out": facts.dropped, "source": redacted(source.urls[0])}
    with whole_file(done_file(target)) as file:
        file.write(json.dumps(facts_of, indent=2).encode())


def done_file(target: Path) -> Path:
    return target.with_name(f"{target.stem}_stats.json")


def claim(folder: Path, made_with: dict[str, Any], rank: int) -> None:
    """Note what the folder's latents are made with. Raises UserError if it holds others."""
    file = folder / STAMP
    if file.is_file() and json.loads(file.read_bytes()) != made_with:
        raise UserError(f"{folder} holds latents of another VAE, size, crop or content: give out another folder, or remove it")
    with whole_file(file, rank) as stream:
        stream.write(json.dumps(made_with, indent=2).encode())


@program
@torch.inference_mode()
@workers_watched()
def main(cfg: DictConfig) -> None:
    """Encode what is not encoded yet; stopped at any moment, the same command goes on."""
    folder, device = output_folder(cfg.out, "out"), pick_device(cfg.device, cfg.local_rank)
    data: ShardDataModule = build(cfg.data)
    if data.codec is None:
        raise UserError("encoding needs a VAE: choose data with a codec, such as data=shards or data=openmoji")
    if data.buckets:
        raise UserError("latents are encoded at one shape: set data.buckets=null")
    data.prepare_data()
    codec = data.codec.to(device)
    made_with = stamp(codec, data.resolution, drawn=cfg.sample, text=cfg.text)
    captions = data.captions if cfg.text else None  # without states the training chooses
    claim(folder, {**made_with, "crops": cfg.crops, "flip": cfg.flip, "captions": captions}, cfg.rank)
    data.warn_of_blindness()
    sources = [(url, source) for source in (*data.train_sources, *data.val_sources) for url in source.urls]
    targets = [folder / Path(redacted(url)).name for url, _ in sources]
    if twice := [target.name for target, count in Counter(targets).items() if count > 1]:
        raise UserError(f"several shards are called {twice[0]}: encode them into different folders")
    decode = Variants(Decode(data.resolution, captions=data.captions, random_crop=cfg.crops > 1), cfg.crops, cfg.flip)
    encoder = Encoder(codec, data.seed, cfg.sample, cfg.text)
    mine = list(zip(targets, sources, strict=True))[cfg.rank :: cfg.world_size]
    left = [(target, url, source) for target, (url, source) in mine if not (target.is_file() and done_file(target).is_file())]
    with tqdm(desc="encoding", unit="image", disable=not left) as bar:
        for number, (target, url, source) in enumerate(left):
            bar.set_postfix_str(f"shard {number + 1} of {len(left)}")
            encode_shard(source.part(url), encoder, decode, target, data, bar)
    print(f"latents: {folder}   ({len(targets)} shards, {len(left)} of them new)")
    print(f"next:    python train.py data=latents data.resolution={data.resolution} data.shards='{folder}/<shards>.tar'")


if __name__ == "__main__":
    main()
