"""One DataModule for every module: shards -> decoded batches -> (frozen codec) -> `LatentBatch`."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lcm.core.batch import LatentBatch
from lcm.core.errors import UserError
from lcm.core.numbers import Count, Positive, Seed, Share, Whole
from lcm.core.random import RankSlice
from lcm.data.buckets import aspect, shapes_of
from lcm.data.cache import ShardCache
from lcm.data.filters import Filters
from lcm.data.folder import FolderSource
from lcm.data.latents import DecodeLatents, check_stamp, collate_latents
from lcm.data.order import BucketOrder, Order
from lcm.data.sample_fields import Skip
from lcm.data.source import Source
from lcm.data.stream import PATIENCE, PassStream, Skips, Stream, TrainStream, rng_of
from lcm.data.transforms import Decode, collate
from lcm.data.urls import expand_urls
from lcm.data.workers import Loader
from lcm.models.codec import LatentCodec, to_signed_range
from lcm.runtime.atomic_io import digest

log = logging.getLogger(__name__)
IMAGES_SEEN = "trainer/images_seen"  # the axis of curves in wandb


class ShardDataModule(L.LightningDataModule):
    """Batches from webdataset shards or a folder of pictures.

    With a codec, batches are `LatentBatch`. Without one they are `{"x": [-1, 1], "captions", ...}`.

    shards: paths or URLs of .tar files, globs, braces, @list files. folder: pictures with captions, see `FolderSource`.
    source: a custom class, see docs/extending.md. sources: several sources by weight, `[{"urls", "folder" or "source",
    "weight"}, ...]`. Give exactly one of these four arguments.
    allow_pipe: also allow `pipe:<command that prints a shard>`.
    val_shards: read in one ordered, complete pass; None disables validation. filters: apply to training and validation.
    build: called once per node before the data is read, e.g. to draw a dataset.
    latents: the shards hold the output of `python -m lcm.encode` for this codec and resolution.
    resolution: pixels per side; None: as in the codec's pipeline, or 512 without a codec.
    buckets: batches of one shape, see `lcm.data.buckets.shapes_of`; None trains on squares of `resolution`.
    batch_size: per device. shuffle, lanes: see `lcm.data.order`. index: the folder of the shards' indexes.
    cache: the cache of remote shards; None keeps the shards in memory, see `lcm.data.memory`.
    captions: weights of the members or .json fields with captions, see `CaptionChoice`.
    timeout: seconds without data after which the training ends with an error.
    max_skip_ratio: a larger share of damaged samples stops the training.

    Nothing is counted before the first batch. A checkpoint holds the position after the last consumed batch. A resumed run sees
    the next samples, with any number of workers and ranks.
    """

    def __init__(
        self,
        shards: str | list[str] | None = None,
        *,
        folder: str | None = None,
        source: Callable[..., Source] | None = None,
        sources: Sequence[dict[str, Any]] | None = None,
        val_shards: str | list[str] | None = None,
        build: Callable[[], None] | None = None,
        codec: LatentCodec | None = None,
        filters: Filters | None = None,
        cache: ShardCache | None = None,
        index: str | None = None,
        allow_pipe: bool = False,
        resolution: Count | None = None,
        buckets: float | Sequence[Sequence[int]] | None = None,
        batch_size: Count = 16,
        val_batch_size: Count = 64,
        num_workers: Whole = 4,
        caption_dropout: Share = 0.0,
        captions: dict[str, float] | None = None,
        random_crop: bool = False,
        flip: bool = False,
        latents: bool = False,
        shuffle: Whole = 512,
        lanes: Count = 16,
        max_skip_ratio: Share = 0.05,
        seed: Seed = 0,
        timeout: Positive = 600.0,
    ) -> None:
        super().__init__()
        if sum(argument is not None for argument in (shards, folder, source, sources)) != 1:
            raise UserError(
                "give the training data in one way: data.shards=<.tar files>, data=folder data.folder=<pictures>, or "
                "data.sources=[{urls: ..., weight: ...}, ...]"
            )
        self.option = "data.sources" if sources is not None else "data.folder" if folder is not None else "data.shards"
        if sources is None:
            kinds = {"urls": shards, "folder": folder, "source": source}
            sources = [{"weight": 1.0, **{name: value for name, value in kinds.items() if value is not None}}]
        self.sources = list(sources)
        self.val_shards, self.build, self.codec, self.filters, self.cache = val_shards, build, codec, filters, cache
        self.index, self.batch_size, self.val_batch_size = index, batch_size, val_batch_size
        self.num_workers, self.timeout, self.allow_pipe = num_workers, timeout, allow_pipe
        self.shuffle, self.lanes, self.seed = shuffle, lanes, seed
        self.position, self.skips = 0, Skips(max_skip_ratio)
        if resolution is None:
            resolution = 512 if codec is None else codec.resolution
        if resolution is None:
            raise UserError("data.codec.pipeline does not say the size of its images: set data.resolution=<pixels>")
        if codec is not None and resolution % codec.factor:
            raise UserError(
                f"data.resolution={resolution} is not a multiple of the VAE's factor {codec.factor}: set a multiple"
            )
        if codec is not None and codec.cache is not None and (random_crop or flip):
            raise UserError("data.codec.cache=true keeps one encoding per image: set data.random_crop=false data.flip=false")
        self.resolution, self.latents, self.captions = resolution, latents, captions
        self.buckets = [] if buckets is None else shapes_of(buckets, resolution, 1 if codec is None else codec.factor)
        self.decode: Decode | DecodeLatents
        self.val_decode: Decode | DecodeLatents
        if latents:
            if codec is None or random_crop or flip or self.buckets:
                raise UserError(
                    "data.latents=true needs data.codec, and lcm.encode has already cropped and flipped the pictures: leave "
                    "data.random_crop, data.flip and data.buckets out"
                )
            self.decode = DecodeLatents(caption_dropout=caption_dropout, captions=captions)
            self.val_decode = DecodeLatents(captions=captions)
        else:
            self.decode = Decode(
                resolution, caption_dropout=caption_dropout, captions=captions, random_crop=random_crop, flip=flip
            )
            self.val_decode = Decode(resolution, captions=captions)

    def prepare_data(self) -> None:
        """Build and check the data once per node, before the other ranks need it."""
        if self.build is not None:
            self.build()
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Check the first samples of each source. Nothing is counted."""
        nodes = self.trainer.num_nodes if self.trainer else 1
        self.train_sources = [self._checked(self._train_source(source), -(-self.lanes // nodes)) for source in self.sources]
        self.val_sources = []
        if self.val_shards is not None:
            self.val_sources = [self._checked(self.make_source(self.val_shards, "data.val_shards", **self.source_options))]
        weights = [source.get("weight", 1.0) for source in self.sources]
        order = Order(self.train_sources, weights, seed=self.seed, shuffle=self.shuffle, lanes=self.lanes)
        options = {"batch_size": self.batch_size * self.world[1], "seed": self.seed}
        self.order = BucketOrder(order, self.buckets, **options) if self.buckets else order
        self.quotas = order.quotas
        if stage == "fit":
            self.check_usable(self.val_sources)
            self.warn_of_unused_rules()
            for source in self.train_sources:
                if gone := source.gone():
                    log.warning("%d shards are listed in manifest.json but do not exist, such as %s", len(gone), gone[0])

    def check_usable(self, sources: Sequence[Source]) -> None:
        """Raise UserError if no sample of a source decodes, because a pass over this source would be empty."""
        for source in sources:
            if not self.decodes(source):
                null = ", or set data.val_shards=null" if source.option == "data.val_shards" else ""
                raise UserError(f"no sample of {source.option} could be decoded, see the warnings above: repair it{null}")

    def decodes(self, source: Source) -> bool:
        """Return whether one of the first usable samples decodes. Raise UserError if no sample is usable."""
        tried = 0
        for shard in range(len(source.urls)):
            number = 0
            while tried < PATIENCE and number < source.usable(shard, number + 1)[0]:
                with suppress(Skip):
                    self.val_decode(source.read(shard, number), rng_of(self.seed, tried))
                    return True
                tried, number = tried + 1, number + 1
        if not tried:
            raise source.nothing_usable()
        return False

    def warn_of_unused_rules(self) -> None:
        """Warn of each filter and caption name whose field no sample has."""
        for source in self.train_sources:
            for name in source.unused_filters():
                if source.filters is None or name not in source.filters.chosen:
                    continue  # filters with default settings need not have an effect
                log.warning("data.filters.%s leaves out nothing, because no sample has the field that it reads", name)
            for name in source.absent_captions():
                log.warning("data.captions.%s is in no sample, neither as a member nor as a field of the .json", name)

    @property
    def source_options(self) -> dict[str, Any]:
        """Return the options that the sources of training and validation share."""
        return {"needs": self.decode.needs, "aspect": aspect if self.buckets else None}

    def _train_source(self, source: dict[str, Any]) -> Source:
        if "urls" in source:
            return self.make_source(source["urls"], self.option, **self.source_options)
        kind = source["source"] if "source" in source else partial(FolderSource, source["folder"])
        return kind(captions=self.captions, filters=self.filters, option=self.option, **self.source_options)

    def _checked(self, source: Source, lanes: int = 1) -> Source:
        source.check_room(lanes)
        source.check()
        if self.latents and self.codec is not None:
            check_stamp(source.urls, self.codec, self.resolution, self.captions)
        return source

    def make_source(self, urls: str | list[str], option: str, **options: Any) -> Source:
        """Return a source of shards with the settings of this data. option: the configuration key of `urls`, for messages."""
        expanded = expand_urls(urls, option, allow_pipe=self.allow_pipe)
        options = {"captions": self.captions, "filters": self.filters, "cache": self.cache, "index": self.index, **options}
        return Source(expanded, option=option, **options)

    @property
    def sample_size(self) -> int | None:
        """Return the latent pixels per side, which become `sample_size` in the trained network's config; None: no codec."""
        return None if self.codec is None else self.resolution // self.codec.factor

    @property
    def world(self) -> tuple[int, int]:
        """Return the rank and the world size."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, kind: Callable[..., Stream], *data: Any, **options: Any) -> DataLoader:
        rank, world_size = self.world
        collate_fn = collate_latents if self.latents else collate
        stream = kind(*data, collate=collate_fn, seed=self.seed, rank=rank, world_size=world_size, **options)
        return Loader(stream, num_workers=self.num_workers, pin_memory=torch.cuda.is_available(), patience=self.timeout)

    def train_dataloader(self) -> DataLoader:
        start = self.position
        if self.buckets:  # a global batch begins at a multiple of its size, which may differ from the checkpoint's
            size = self.batch_size * self.world[1]
            start = -(-start // size) * size
        options = {"decode": self.decode, "batch_size": self.batch_size, "start": start}
        return self._loader(TrainStream, self.train_sources, self.order, **options)

    def val_dataloader(self) -> DataLoader | list[Any]:
        if not self.val_sources:
            return []
        options = {"decode": self.val_decode, "batch_size": self.val_batch_size, "shapes": self.buckets}
        return self._loader(PassStream, self.val_sources[0], **options)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any] | LatentBatch:
        """Encode a batch. Lightning calls this just before the step that consumes the batch, so its position is noted here."""
        if isinstance(batch, LatentBatch):
            return batch
        training = self.trainer is not None and self.trainer.training
        if self.trainer is not None and training:
            self.position = batch["position"]
            for logger in self.trainer.loggers:
                if hasattr(logger, "images_seen"):
                    logger.images_seen = self.position
            self.skips.add(self.batch_size, batch["skipped"], batch["left_out"])
            for logger in self.trainer.loggers if batch["skipped"] or batch["left_out"] else ():
                logger.log_metrics(self.skips.metrics(), self.trainer.global_step)
        if self.codec is None:
            return {**batch, "x": to_signed_range(batch["x"])}
        device = batch["moments" if self.latents else "x"].device
        self.codec.place(device, batch)
        rank, world_size = self.world
        keys = (self.seed, training, batch["position"])
        return self.codec.encode(batch, RankSlice(device, *keys, rank=rank, world_size=world_size))

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.skips.by_reason:
            log.warning("%s", self.skips)

    def identity(self) -> str:
        """Return a digest of everything that determines the order, except the samples in each shard."""
        names = [[name.rpartition("/")[2] for name in source.urls] for source in self.train_sources]
        weights = [source.get("weight", 1.0) for source in self.sources]
        rules = self.train_sources[0].rules_identity
        return digest([names, weights, self.lanes, self.shuffle, self.seed, self.buckets, rules, self.quotas])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "data": self.identity(), "skips": self.skips.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("data") != self.identity():
            log.warning(
                "the order of the training data starts anew: the shards, data.lanes, data.shuffle, data.seed or data.filters "
                "changed since the checkpoint"
            )
            return
        self.position = state_dict["position"]
        self.skips.load_state_dict(state_dict["skips"])
