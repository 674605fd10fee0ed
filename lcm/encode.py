"""Images encoded once: `python -m lcm.encode data=shards data.shards='a/*.tar' data.codec.pipeline=<folder> out=latents`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count, Seed

program = Program("encode", out=str, crops=Count, flip=bool, sample=bool, text=bool, seed=Seed)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import json
import time
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from omegaconf import DictConfig
from tqdm import tqdm

from lcm.app.inputs import output_folder, pick_device
from lcm.core.errors import UserError
from lcm.data.datamodule import ShardDataModule
from lcm.data.encoding import Encoder, Variants, collate_variants
from lcm.data.latents import STAMP, stamp
from lcm.data.source import Source
from lcm.data.stream import PassStream
from lcm.data.transforms import Decode
from lcm.data.workers import Loader, workers_watched
from lcm.runtime.atomic_io import whole_file


def encode_shards(source: Source, targets: list[Path], stream: PassStream, encoder: Encoder, data: ShardDataModule) -> None:
    """Encode the shards of a source one after another, from one stream of their images.

    A shard of latents appears in one rename. `<stem>_stats.json` beside the shard then marks it as done.
    """
    batches = iter(Loader(stream, num_workers=data.num_workers, patience=data.timeout))
    batch = next(batches, None)
    with tqdm(total=len(targets), desc="encoding", unit="shard") as bar:
        images, started = 0, time.monotonic()
        for shard, target in enumerate(targets):
            skipped, written = Counter[str](), 0
            with whole_file(target) as file, wds.TarWriter(file, mtime=0) as writer:
                while batch is not None and batch["shard"] == shard:
                    for sample in encoder(batch, target.name) if "members" in batch else ():
                        writer.write(sample)
                        written += 1
                    skipped.update(batch["skipped"])
                    bar.set_postfix_str(f"{(images + written) / (time.monotonic() - started):.1f} images/s")
                    batch = next(batches, None)
            record = {"successes": written, "skipped": dict(skipped), "left_out": source.notes(shard).left_out}
            with whole_file(done_file(target)) as file:
                file.write(json.dumps({**record, "source": source.title(shard)}, indent=2).encode())
            images += written
            bar.update()


def done_file(target: Path) -> Path:
    """Return the file that marks a latent shard as done."""
    return target.with_name(f"{target.stem}_stats.json")


def claim(folder: Path, made_with: dict[str, Any], rank: int) -> None:
    """Write the settings of the latents into their folder. Raises UserError if the folder holds latents of other settings."""
    file = folder / STAMP
    if file.is_file() and json.loads(file.read_bytes()) != made_with:
        raise UserError(
            f"{folder} holds latents of another VAE, size, crop or content: set out=<another folder>, or remove this one"
        )
    with whole_file(file, rank) as stream:
        stream.write(json.dumps(made_with, indent=2).encode())


@program
@torch.inference_mode()
@workers_watched()
def main(cfg: DictConfig) -> None:
    """Encode the shards that are not encoded yet. A stopped encoding is resumed by the same command."""
    folder, device = output_folder(cfg.out, "out"), pick_device(cfg.device, cfg.local_rank)
    data: ShardDataModule = build(cfg.data)
    if data.codec is None:
        raise UserError("encoding needs a VAE: choose data with a codec, such as data=shards or data=openmoji")
    if data.buckets:
        raise UserError("latents are encoded at one shape: set data.buckets=null")
    data.prepare_data()
    sources = (*data.train_sources, *data.val_sources)
    data.check_usable(sources)
    codec = data.codec.to(device)
    made_with = stamp(codec, data.resolution, drawn=cfg.sample, text=cfg.text)
    captions = data.captions if cfg.text else None  # without text embeddings the training chooses the caption
    claim(folder, {**made_with, "crops": cfg.crops, "flip": cfg.flip, "captions": captions}, cfg.rank)
    data.warn_of_unused_rules()
    shards = [(folder / source.name(shard), source, shard) for source in sources for shard in range(len(source.urls))]
    if twice := [target.name for target, count in Counter(target for target, _, _ in shards).items() if count > 1]:
        raise UserError(f"several shards are called {twice[0]}: encode them into different folders")
    decode = Variants(Decode(data.resolution, captions=data.captions, random_crop=cfg.crops > 1), cfg.crops, cfg.flip)
    encoder = Encoder(codec, data.seed, cfg.sample, cfg.text)
    rank_shards = shards[cfg.rank :: cfg.world_size]
    remaining = [entry for entry in rank_shards if not (entry[0].is_file() and done_file(entry[0]).is_file())]
    for source, group in groupby(remaining, key=itemgetter(1)):
        numbers = [(target, shard) for target, _, shard in group]
        part = source.subset([shard for _, shard in numbers])
        options: dict[str, Any] = {"batch_size": data.val_batch_size, "seed": data.seed, "by_shard": True}
        stream = PassStream(part, decode=decode, collate=collate_variants, **options)
        encode_shards(part, [target for target, _ in numbers], stream, encoder, data)
    print(f"latents: {folder}   ({len(shards)} shards, {len(remaining)} of them new)")
    print(f"next:    python train.py data=latents data.resolution={data.resolution} data.shards='{folder}/<shards>.tar'")


if __name__ == "__main__":
    main()
