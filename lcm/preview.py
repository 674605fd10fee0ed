"""A look at training data before any training: `python -m lcm.preview data=shards data.shards='mine/*.tar'`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count, Seed

program = Program("preview", samples=Count, shown=Count, output=str, seed=Seed)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.nn.functional import pad
from tqdm import tqdm

from lcm.app.images import grid, save_png
from lcm.app.inputs import output_folder
from lcm.data.datamodule import ShardDataModule
from lcm.data.members import REASONS
from lcm.data.source import total_dropped
from lcm.data.workers import workers_watched


@program
@workers_watched()
def main(cfg: DictConfig) -> None:
    """Print what passes each filter, sizes, captions and samples/s; write a grid of pictures as a network would see them."""
    folder = output_folder(cfg.output)
    data: ShardDataModule = build(cfg.data)
    data.prepare_data()
    data.setup()
    for source in data.train_sources:
        facts = source.facts()
        dropped = total_dropped(facts)
        used = sum(shard.samples for shard in facts)
        print(f"shards:   {len(facts)} with {used + dropped.total()} samples, of which {used} are used")
        for reason, count in dropped.most_common():
            print(f"          {count} ({count / (used + dropped.total()):.1%}) left out: {described(reason)}")
        for name in source.blind_filters():
            print(f"filter:   {name} leaves out nothing: no sample says what it reads")
        for name in source.absent_captions():
            print(f"captions: {name} is in no sample, neither a member nor a field of the .json")
    for bucket in data.orders if data.buckets else ():
        print(f"bucket:   {bucket.shape} with {bucket.size} samples")
    count = min(cfg.samples, sum(data.sizes))
    images: list[torch.Tensor] = []
    captions: list[str] = []
    sizes: list[list[int]] = []
    skipped, first, started = Counter[str](), 0, 0.0
    with tqdm(total=count, unit="sample", desc="reading") as bar:
        for batch in islice(data.train_dataloader(), -(-count // data.batch_size)):
            if not captions:  # it waited for the workers to start: the rate counts from here
                started, first = time.monotonic(), len(captions) + len(batch["captions"])
            images += batch["x"][: max(cfg.shown - len(images), 0)]
            captions += batch["captions"]
            sizes += batch["original_sizes"].tolist()
            skipped.update(batch["skipped"])
            bar.update(min(len(batch["captions"]), count - bar.n))
    rate = (len(captions) - first) / (time.monotonic() - started) if len(captions) > first else float("nan")
    captions, sizes = captions[:count], sizes[:count]  # the last batch is filled up from the next epoch
    shorter, words = (
        torch.tensor([min(size) for size in sizes]).float(),
        torch.tensor([len(c.split()) for c in captions]).float(),
    )
    print(f"reading:  {rate:.0f} samples/s with {data.num_workers} workers, at {data.resolution} px")
    print(f"sizes:    shorter side {quantiles(shorter)} px")
    print(f"captions: {quantiles(words)} words; {captions.count('')} of {len(captions)} empty")
    for reason, number in skipped.most_common():
        print(f"damaged:  {number} of {len(captions)}: {described(reason)}")
    side = max(max(image.shape) for image in images)
    images = [pad(image, (0, side - image.shape[2], 0, side - image.shape[1]), value=255) for image in images]
    wide = min(len(images), 4)
    starts = range(0, len(images) - len(images) % wide, wide)
    rows = [torch.stack(images[i : i + wide]) for i in starts]
    labels = [[f"{column}: {caption}" for column, caption in enumerate(captions[i : i + wide], 1)] for i in starts]
    save_png(grid(rows, labels), folder / "grid.png")
    print(f"picture:  {Path(folder, 'grid.png')}")


def described(reason: str) -> str:
    return f"{reason} ({REASONS[reason]})" if reason in REASONS else reason


def quantiles(values: torch.Tensor) -> str:
    """ "minimum / median / maximum"."""
    return " / ".join(f"{value:.0f}" for value in values.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist())


if __name__ == "__main__":
    main()
