"""Batches of decoded samples in the order of `lcm.data.order`, divided among ranks and workers.

Batch b is positions `[start + b G, start + (b + 1) G)` of the order, G = batch_size x world_size. Workers take turns over
batches. The samples of a step therefore depend on G, but not on the number of workers or ranks.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lcm.core.errors import UserError
from lcm.data.left_out import take_left_out
from lcm.data.order import BucketOrder, Order, SampleRef, Shape, one_pass
from lcm.data.sample_fields import Sample, Skip
from lcm.data.source import Source

log = logging.getLogger(__name__)
PATIENCE = 256  # samples in a row that may fail to decode
NAMED = 10  # skipped samples that a worker names for each reason; all are counted
ENOUGH = 1000  # samples before the share of damaged samples is checked
DecodeFn = Callable[[Sample, random.Random], Sample]
CollateFn = Callable[[list[Sample]], Sample]


def rng_of(seed: int | str, position: int) -> random.Random:
    """Return the generator of all random choices for the sample at a position of the order."""
    return random.Random(f"{seed}/{position}")


class Stream(IterableDataset):
    """The base of `TrainStream` and `PassStream`: reads and decodes samples, and counts damaged ones.

    decode: `(sample, rng) -> dict`; raises Skip on a damaged sample. collate: `list -> dict`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        decode: DecodeFn,
        collate: CollateFn,
        batch_size: int,
        seed: int | str = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources, self.decode, self.collate = sources, decode, collate
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.named: Counter[str] = Counter()

    def decoded(
        self, members: Sequence[tuple[int, SampleRef]], skipped: Counter[str], seed: int | str | None = None
    ) -> list[Sample]:
        """Return the decoded samples. Samples that fail are counted in `skipped` by reason, and the first are logged.

        members: (position, sample). seed: the seed of random choices; None: the stream's seed.
        """
        seed = self.seed if seed is None else seed
        good: list[Sample] = []
        for position, ref in members:
            sample: Sample = {}
            try:
                sample = self.sources[ref.source].read(ref.shard, ref.sample)
                if ref.shape is not None:
                    sample["__shape__"] = ref.shape
                good.append(self.decode(sample, rng_of(seed, position)))
            except Skip as skip:
                skipped[skip.reason] += 1
                self.named[skip.reason] += 1
                if self.named[skip.reason] <= NAMED:
                    log.warning("skipping %s of %s: %s", sample.get("__key__", "a sample"), sample.get("__url__", "?"), skip)
        return good

    def packed(self, good: list[Sample], position: int, skipped: Counter[str]) -> dict[str, Any]:
        return {**self.collate(good), "position": position, "skipped": dict(skipped), "left_out": take_left_out()}


class TrainStream(Stream):
    """Endless batches of one rank, from position `start` on.

    Each batch also holds "position": the position after it; "skipped": counts of this rank's damaged samples by reason;
    "left_out": counts by reason of the samples that scans have left out since the last batch.
    """

    def __init__(self, sources: Sequence[Source], order: Order | BucketOrder, *, start: int = 0, **options: Any) -> None:
        super().__init__(sources, **options)
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in itertools.count(first, step):
            skipped: Counter[str] = Counter()
            good = self._sound(number, skipped)
            yield self.packed(good, self._positions(number).stop, skipped)

    def _positions(self, number: int) -> range:
        size = self.batch_size * self.world_size
        return range(self.start + number * size, self.start + (number + 1) * size)

    def _share(self, number: int) -> list[tuple[int, SampleRef]]:
        return self.order.batch(self._positions(number), self.rank, self.world_size)

    def _sound(self, number: int, skipped: Counter[str]) -> list[Sample]:
        """Return this rank's samples of a batch. Sound samples replace damaged ones, so a batch keeps its size.

        Replacements come from the same batch, or from the next batch with a sound sample.
        """
        members = self._share(number)
        good = self.decoded(members, skipped)
        failed: Counter[str] = Counter()
        while not good:
            number += 1
            # All ranks train on one shape at a step, so samples of another bucket take this batch's shape.
            later = [(position, ref._replace(shape=members[0][1].shape)) for position, ref in self._share(number)]
            good = self.decoded(later, failed)
            if failed.total() > PATIENCE:
                raise UserError(f"none of {failed.total()} samples in a row could be decoded, see the warnings above")
        return [good[i % len(good)] for i in range(len(members))]


class PassStream(Stream):
    """One ordered, complete pass over a source. A batch leaves out samples that do not decode, so it may be smaller.

    by_shard: no batch crosses the end of a shard, and each batch holds the number of its "shard". Random choices then depend on
    the shard's name and the place of a sample in the shard only.
    """

    def __init__(self, source: Source, *, shapes: Sequence[Shape] = (), by_shard: bool = False, **options: Any) -> None:
        super().__init__([source], **options)
        self.shapes, self.by_shard = shapes, by_shard

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        position, seed, last = 0, self.seed, -1
        size = self.batch_size * self.world_size
        for number, batch in enumerate(one_pass(self.sources[0], size, shapes=self.shapes, by_shard=self.by_shard)):
            if self.by_shard and batch[0].shard != last:
                last, position = batch[0].shard, 0
                seed = f"{self.seed}/{self.sources[0].name(last)}"
            members = list(enumerate(batch, position))
            position += len(batch)
            if number % step != first:
                continue
            skipped: Counter[str] = Counter()
            good = self.decoded(self._rank_slice(members), skipped, seed) or self._stand_in(members)
            if good or self.by_shard:
                packed = self.packed(good, position, skipped) if good else {"skipped": dict(skipped), "left_out": {}}
                yield {**packed, "shard": batch[0].shard} if self.by_shard else packed

    def _rank_slice(self, members: list[tuple[int, SampleRef]]) -> list[tuple[int, SampleRef]]:
        """Return every world_size-th sample. A rank without a sample repeats one: all ranks have equally many batches."""
        return members[self.rank :: self.world_size] or members[self.rank % len(members) :][:1]

    def _stand_in(self, members: list[tuple[int, SampleRef]]) -> list[Sample]:
        """Return a sound sample for a rank whose slice is damaged, so that all ranks have equally many batches."""
        if self.world_size == 1:
            return []
        shape = members[0][1].shape
        following = (ref for batch in one_pass(self.sources[0], 1) for ref in batch)
        for ref in itertools.chain((ref for _, ref in members), following):
            if good := self.decoded([(members[0][0], ref._replace(shape=shape))], Counter()):
                return good
        raise UserError("no sample of this data could be decoded, see the warnings above")


class Skips:
    """Counts of damaged samples by reason. A share above `max_ratio` ends the training."""

    def __init__(self, max_ratio: float) -> None:
        self.max_ratio, self.seen, self.by_reason, self.left_out = max_ratio, 0, Counter[str](), Counter[str]()

    def add(self, seen: int, skipped: dict[str, int], left_out: dict[str, int]) -> None:
        """Add counts. left_out: samples that the filters or the index left out. Raises UserError above the limit."""
        self.seen += seen
        self.by_reason.update(skipped)
        self.left_out.update(left_out)
        if self.seen >= ENOUGH and self.by_reason.total() > self.max_ratio * self.seen:
            raise UserError(
                f"{self}, more than data.max_skip_ratio={self.max_ratio}: the warnings above name some of them; repair "
                "the shards, or raise data.max_skip_ratio"
            )

    def __str__(self) -> str:
        return f"{self.by_reason.total()} of {self.seen} samples were damaged and skipped ({dict(self.by_reason)})"

    def metrics(self) -> dict[str, float]:
        counts = {"skipped": self.by_reason, "left_out": self.left_out}
        return {f"data/{kind}/{reason}": count for kind, counter in counts.items() for reason, count in counter.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "by_reason": dict(self.by_reason)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.by_reason = state["seen"], Counter(state["by_reason"])
