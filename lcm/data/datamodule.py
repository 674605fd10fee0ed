"""One DataModule for every module: shards -> decoded batches -> (frozen codec) -> `LatentBatch`."""

import logging
from collections.abc import Callable, Sequence
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
from lcm.data.epochs import training_order, validation_order
from lcm.data.filters import Filters
from lcm.data.latents import DecodeLatents, check_stamp, collate_latents
from lcm.data.order import Places
from lcm.data.shards import expand_urls
from lcm.data.skips import Skips
from lcm.data.source import Source, total_dropped
from lcm.data.stream import PATIENCE, ShardStream
from lcm.data.transforms import Decode, collate
from lcm.data.workers import Loader
from lcm.models.codec import LatentCodec, to_signed_range

log = logging.getLogger(__name__)


class ShardDataModule(L.LightningDataModule):
    """Streams webdataset shards; with a codec its batches are `LatentBatch`, without one `{"x": [-1, 1], "captions", ...}`.

    shards: paths or URLs of .tar files, globs, braces, @list files; or sources: `[{"urls", "weight"}, ...]`, taken by weight.
    allow_pipe: also `pipe:<command>`, of which the output is a shard.
    val_shards: one ordered, complete pass; None disables validation. filters: which samples of both are used.
    build: called once per node before anything else, e.g. to draw a dataset that is made on the spot.
    latents: the shards hold what `python -m lcm.encode` made of images with this codec at this resolution.
    resolution: pixels a side; None: those of the codec's pipeline, and 512 without a codec.
    buckets: batches of one shape, see `lcm.data.buckets.shapes_of`; None trains on squares of `resolution`.
    batch_size: per device. shuffle, lanes: see `lcm.data.order`. index: the folder that keeps the shards' sample counts.
    captions: weights of the members or .json fields that hold one, see `CaptionChoice`.
    timeout: seconds without data after which the training ends with an error.
    max_skip_ratio: more damaged samples than this share of those seen stop the training.
    A checkpoint holds the position in the order after the last consumed batch: a resumed run sees the next samples, none twice,
    with any number of workers and ranks.
    """

    def __init__(
        self,
        shards: str | list[str] | None = None,
        *,
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
        shuffle: Whole = 2048,
        lanes: Count = 16,
        max_skip_ratio: Share = 0.05,
        seed: Seed = 0,
        timeout: Positive = 600.0,
    ) -> None:
        super().__init__()
        self.option = "data.shards" if sources is None else "data.sources"
        if shards is not None and sources is None:
            sources = [{"urls": shards, "weight": 1.0}]
        elif shards is not None or sources is None:
            raise UserError(
                "give the training data, once: data.shards=<.tar files> or data.sources=[{urls: ..., weight: ...}, ...]"
            )
        self.weighted: list[tuple[str | list[str], float]] = [(source["urls"], source["weight"]) for source in sources]
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
            raise UserError(f"data.resolution={resolution} is not a multiple of the VAE's factor {codec.factor}")
        if codec is not None and codec.cache is not None and (random_crop or flip):
            raise UserError("data.codec.cache=true keeps one encoding per image: set data.random_crop=false data.flip=false")
        self.resolution, self.latents, self.captions = resolution, latents, captions
        self.buckets = [] if buckets is None else shapes_of(buckets, resolution, 1 if codec is None else codec.factor)
        self.decode: Decode | DecodeLatents
        self.val_decode: Decode | DecodeLatents
        if latents:
            if codec is None or random_crop or flip or self.buckets:
                raise UserError(
                    "data.latents=true needs a codec, and lcm.encode chose crops, flips and shape: set none of them"
                )
            self.decode = DecodeLatents(caption_dropout=caption_dropout, captions=captions)
            self.val_decode = DecodeLatents(captions=captions)
        else:
            self.decode = Decode(
                resolution, caption_dropout=caption_dropout, captions=captions, random_crop=random_crop, flip=flip
            )
            self.val_decode = Decode(resolution, captions=captions)

    def prepare_data(self) -> None:
        """Once per node: the other ranks then find the data drawn and the samples counted."""
        if self.build is not None:
            self.build()
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        self.train_sources = [self._source(urls, self.option) for urls, _ in self.weighted]
        self.val_sources = [] if self.val_shards is None else [self._source(self.val_shards, "data.val_shards")]
        self.val_orders = [validation_order(source.facts(), self.buckets) for source in self.val_sources]
        facts, weights = [source.facts() for source in self.train_sources], [weight for _, weight in self.weighted]
        options = {"seed": self.seed, "shuffle": self.shuffle, "lanes": self.lanes}
        batch = self.batch_size * self.world[1]
        self.order, self.orders = training_order(facts, weights, self.buckets, batch=batch, **options)
        self.sizes = [order.size for order in self.orders]
        dropped = total_dropped([shard for of in facts for shard in of])
        if dropped and stage == "fit":
            log.warning("using %d training samples; left out: %s", sum(self.sizes), dict(dropped))
        if stage == "fit":
            self.check_validation()
            self.warn_of_blindness()
        for source in self.train_sources if stage == "fit" else ():
            if gone := source.manifests.gone(source.urls):
                log.warning("%d shards are in their manifest, but not there, such as %s", len(gone), gone[0])

    def check_validation(self) -> None:
        """Raise UserError if no validation sample decodes: a pass over the data would be empty."""
        for source, order in zip(self.val_sources, self.val_orders, strict=True):
            stop = min(order.size, PATIENCE)
            stream = ShardStream([source], order, decode=self.val_decode, collate=lambda _: {}, batch_size=1, stop=stop)
            if next(iter(stream), None) is None:
                raise UserError("no sample of data.val_shards could be decoded, see the warnings above; null: no validation")

    def warn_of_blindness(self) -> None:
        """Warn of each filter and caption name that no sample has."""
        for source in self.train_sources:
            for name in source.blind_filters():
                if source.filters is None or name not in source.filters.chosen:
                    continue  # a default, which need not leave out anything
                log.warning("data.filters.%s leaves out nothing, no sample says what it reads (null: it need not)", name)
            for name in source.absent_captions():
                log.warning("data.captions.%s is in no sample, neither a member nor a field of the .json", name)

    def _source(self, urls: str | list[str], option: str) -> Source:
        source = self.reader(urls, option, needs=self.decode.needs, measure=aspect if self.buckets else None)
        source.check()
        if self.latents and self.codec is not None:
            check_stamp(source.urls, self.codec, self.resolution, self.captions)
        return source

    def reader(self, urls: str | list[str], option: str, **of: Any) -> Source:
        """Of any shards in the way of this data; option: the configuration's, for errors."""
        found = expand_urls(urls, option, allow_pipe=self.allow_pipe)
        options = {"captions": self.captions, "filters": self.filters, "cache": self.cache, "index": self.index, **of}
        return Source(found, option=option, **options)

    @property
    def sample_size(self) -> int | None:
        """Latent cells a side, which the UNet that is trained is noted to have."""
        return None if self.codec is None else self.resolution // self.codec.factor

    @property
    def world(self) -> tuple[int, int]:
        """This rank, of how many."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, sources: list[Source], order: Places, decode: Decode | DecodeLatents, **stream: Any) -> DataLoader:
        rank, world_size = self.world
        dataset = ShardStream(
            sources,
            order,
            decode=decode,
            collate=collate_latents if self.latents else collate,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            **stream,
        )
        return Loader(
            dataset,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            patience=self.timeout,
        )

    def train_dataloader(self) -> DataLoader:
        size, start = self.batch_size, self.position
        if self.buckets:  # with another global batch than before it goes on at the next one
            start = -(-start // (size * self.world[1])) * size * self.world[1]
        return self._loader(self.train_sources, self.order, self.decode, batch_size=size, start=start, ahead=self.shuffle)

    def val_dataloader(self) -> DataLoader | list[Any]:
        if not self.val_sources:
            return []
        [order] = self.val_orders
        options = {"batch_size": self.val_batch_size, "stop": order.size, "cuts": order.cuts}
        return self._loader(self.val_sources, order, self.val_decode, **options)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any] | LatentBatch:
        """Lightning calls this for each batch just before the step that consumes it."""
        if isinstance(batch, LatentBatch):
            return batch
        training = self.trainer is not None and self.trainer.training
        if self.trainer is not None and training:
            self.position = batch["position"]
            self.skips.add(self.batch_size, batch["skipped"])
            for logger in self.trainer.loggers if batch["skipped"] else ():
                logger.log_metrics(self.skips.metrics(), self.trainer.global_step)
        if self.codec is None:
            return {**batch, "x": to_signed_range(batch["x"])}
        device = batch["moments" if self.latents else "x"].device
        if self.codec.device != device:
            self.codec.to(device)
        rank, world_size = self.world
        keys = (self.seed, training, batch["position"])
        return self.codec.encode(batch, RankSlice(self.codec.device, *keys, rank=rank, world_size=world_size))

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.skips.by_reason:
            log.warning("%s", self.skips)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "samples": self.sizes, "skips": self.skips.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("samples") != self.sizes:
            log.warning(
                "the training data changed since the checkpoint (%s samples then, %s now): their order starts anew",
                state_dict.get("samples"), self.sizes,
            )  # fmt: skip
            return
        self.position = state_dict["position"]
        self.skips.load_state_dict(state_dict["skips"])
