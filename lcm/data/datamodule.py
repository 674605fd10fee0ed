"""One DataModule for every module: shards -> decoded batches -> (frozen codec) -> `LatentBatch`."""

import random
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lcm.core.batch import LatentBatch
from lcm.core.random import generator
from lcm.data.codec import LatentCodec, to_unit_range
from lcm.data.shards import Cursor, ShardStream, check_shards, expand_urls
from lcm.data.transforms import Decode, collate
from lcm.errors import UserError


class ShardDataModule(L.LightningDataModule):
    """Streams webdataset shards; with a codec its batches are `LatentBatch`, without one `{"x": [-1, 1], "captions", ...}`.

    shards / val_shards: paths or URLs of .tar files, globs and braces; val_shards=None disables validation.
    build: called once per node before anything else, e.g. to draw a dataset that is made on the spot.
    batch_size: per device. shuffle: samples in the shuffle buffer. The order is a function of `seed`: see `lcm.data.shards`.
    A checkpoint holds the cursor after the last consumed batch, so a resumed run sees the next samples, none twice.
    """

    def __init__(
        self,
        shards: str | list[str],
        *,
        val_shards: str | list[str] | None = None,
        build: Callable[[], None] | None = None,
        codec: LatentCodec | None = None,
        resolution: int = 512,
        batch_size: int = 16,
        val_batch_size: int = 64,
        num_workers: int = 4,
        caption_dropout: float = 0.0,
        random_crop: bool = False,
        flip: bool = False,
        shuffle: int = 2048,
        seed: int = 0,
        timeout: float = 600.0,
    ) -> None:
        super().__init__()
        self.shards, self.val_shards, self.build, self.codec = shards, val_shards, build, codec
        self.batch_size, self.val_batch_size, self.num_workers, self.timeout = batch_size, val_batch_size, num_workers, timeout
        self.shuffle, self.seed, self.cursor = shuffle, seed, Cursor()
        if codec is not None and resolution % codec.factor:
            raise UserError(f"data.resolution={resolution} is not a multiple of the VAE's factor {codec.factor}")
        if codec is not None and codec.cache is not None and (random_crop or flip):
            raise UserError("data.codec.cache=true keeps one encoding per image: set data.random_crop=false data.flip=false")
        self.decode = Decode(resolution, caption_dropout=caption_dropout, random_crop=random_crop, flip=flip)
        self.val_decode = Decode(resolution)

    def prepare_data(self) -> None:
        if self.build is not None:
            self.build()

    def setup(self, stage: str | None = None) -> None:
        self.train_urls = expand_urls(self.shards)
        self.val_urls = [] if self.val_shards is None else expand_urls(self.val_shards, "data.val_shards")
        for urls in (self.train_urls, self.val_urls):
            if urls:
                check_shards(urls)

    def _loader(self, urls: list[str], decode: Decode, **stream: Any) -> DataLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dataset = ShardStream(urls, decode=decode, collate=collate, seed=self.seed, rank=rank, world_size=world_size, **stream)
        workers = self.num_workers
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            timeout=self.timeout if workers else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=one_thread if workers else None,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_urls, self.decode, batch_size=self.batch_size, shuffle=self.shuffle, start=self.cursor)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self._loader(self.val_urls, self.val_decode, batch_size=self.val_batch_size) if self.val_urls else []

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any] | LatentBatch:
        """Lightning calls this for each batch just before the step that consumes it."""
        if isinstance(batch, LatentBatch):
            return batch
        cursor = Cursor(*batch["cursor"])
        training = self.trainer is not None and self.trainer.training
        if training:
            self.cursor = cursor
        if self.codec is None:
            return {**batch, "x": to_unit_range(batch["x"])}
        if self.codec.device != batch["x"].device:
            self.codec.to(batch["x"].device)
        rank = self.trainer.global_rank if self.trainer else 0
        return self.codec.encode(batch, generator(self.codec.device, self.seed, training, *cursor, rank))

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": list(self.cursor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cursor = Cursor(*state_dict["cursor"])


def one_thread(worker: int) -> None:
    """Decoding scales over workers, not over threads within one."""
    torch.set_num_threads(1)
    random.seed(worker)
