"""A preview of training data, before any training: `python -m lcm.preview data=shards data.shards='mine/*.tar'`."""

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
from lcm.data.sample_fields import described
from lcm.data.workers import workers_watched


@program
@workers_watched()
def main(cfg: DictConfig) -> None:
    """Print the counts of filters and buckets, sizes, captions and the reading rate. Write a grid of decoded pictures."""
    folder = output_folder(cfg.output)
    data: ShardDataModule = build(cfg.data)
    data.prepare_data()
    usable = print_sources(data)
    data.check_usable(data.train_sources)
    count = min(cfg.samples, usable)
    images: list[torch.Tensor] = []
    captions: list[str] = []
    sizes: list[list[int]] = []
    skipped, shapes, warm_up, started = Counter[str](), Counter[tuple[int, ...]](), 0, 0.0
    with tqdm(total=count, unit="sample", desc="reading") as bar:
        for batch in islice(data.train_dataloader(), -(-count // data.batch_size)):
            if not captions:  # the first batch waits for the workers, so the rate starts after it
                started, warm_up = time.monotonic(), len(batch["captions"])
            images += batch["x"][: max(cfg.shown - len(images), 0)]
            captions += batch["captions"]
            sizes += batch["original_sizes"].tolist()
            skipped.update(batch["skipped"])
            shapes[tuple(batch["x"].shape[-2:])] += len(batch["captions"])
            bar.update(min(len(batch["captions"]), count - bar.n))
    timed, seconds = len(captions) - warm_up, time.monotonic() - started
    captions, sizes = captions[:count], sizes[:count]  # samples of the next epoch fill the last batch
    words = [len(caption.split()) for caption in captions]
    if timed:
        print(f"reading:  {timed / seconds:.0f} samples/s with {data.num_workers} workers, at {data.resolution} px")
    for shape, number in shapes.most_common() if data.buckets else ():
        print(f"bucket:   {shape[0]} x {shape[1]} with {number} of {sum(shapes.values())} samples")
    print(f"sizes:    shorter side {quantiles([min(size) for size in sizes])} px")
    print(f"captions: {quantiles(words)} words; {captions.count('')} of {len(captions)} empty")
    for reason, number in skipped.most_common():
        print(f"damaged:  {number} of {len(captions)}: {described(reason)}")
    save_grid(images, captions, folder / "grid.png")
    print(f"picture:  {folder / 'grid.png'}")


def print_sources(data: ShardDataModule) -> int:
    """Print the counts of used and left-out samples. Return the number of used samples. Every shard is scanned."""
    usable = 0
    for source in data.train_sources:
        shards = [source.notes(shard) for shard in tqdm(range(len(source.urls)), desc="scanning", unit="shard")]
        used, left_out = sum(notes.samples for notes in shards), source.left_out()
        usable += used
        print(f"shards:   {len(shards)} with {used + left_out.total()} samples, {used} of them are used")
        for reason, count in left_out.most_common():
            print(f"          {count} ({count / (used + left_out.total()):.1%}) left out: {described(reason)}")
        for name in source.unused_filters():
            print(f"filter:   {name} leaves out nothing, because no sample has the field that it reads")
        for name in source.absent_captions():
            print(f"captions: {name} is in no sample, neither as a member nor as a field of the .json")
    return usable


def save_grid(images: list[torch.Tensor], captions: list[str], path: Path) -> None:
    """Write up to four pictures `[3, H, W]` a row, padded with white to one size, with their captions."""
    side = max(max(image.shape) for image in images)
    images = [pad(image, (0, side - image.shape[2], 0, side - image.shape[1]), value=255) for image in images]
    columns = min(len(images), 4)
    starts = range(0, len(images) - len(images) % columns, columns)
    rows = [torch.stack(images[i : i + columns]) for i in starts]
    labels = [[f"{column}: {caption}" for column, caption in enumerate(captions[i : i + columns], 1)] for i in starts]
    save_png(grid(rows, labels), path)


def quantiles(values: list[int]) -> str:
    """Return "minimum / median / maximum"."""
    return " / ".join(f"{value:.0f}" for value in torch.tensor(values).float().quantile(torch.tensor([0.0, 0.5, 1.0])).tolist())


if __name__ == "__main__":
    main()
