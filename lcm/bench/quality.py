"""Time to quality: FID against minutes of training, of this program's recipe and of diffusers' script."""

import sys
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import lightning as L
import torch

from lcm.app.cli import build
from lcm.app.composition import compose
from lcm.app.inputs import pick_device
from lcm.bench import peers
from lcm.bench.measure import Table, now
from lcm.core.errors import UserError
from lcm.data.captions import read_captions
from lcm.data.source import Source
from lcm.data.urls import expand_urls
from lcm.evaluate.clip import mini_clip
from lcm.evaluate.features import Extractor, joined
from lcm.evaluate.metrics import FID, FeatureMetric, scores
from lcm.evaluate.report import plot
from lcm.models.codec import LatentCodec
from lcm.modules.consistency import ConsistencyModule

METRIC = FeatureMetric(title="FID", lower_is_better=True, features="fid", metric=FID)


class Judge:
    """Measures the FID of students with the same captions, seeds and features.

    captions: the weight of each caption field of `shards`. w: guidance weights; the lowest FID counts.
    """

    def __init__(
        self, shards: str, captions: dict[str, float], *, resolution: int, samples: int, steps: int, w: list[float], cache: str
    ) -> None:
        source = Source(expand_urls(shards), captions=captions, option="val_shards")
        texts = read_captions(source, samples)
        self.prompts = [texts[i % len(texts)] for i in range(samples)]
        self.steps, self.w = steps, w
        self.extract = Extractor(mini_clip("mini"), resolution=resolution).to(pick_device("auto"))
        self.real = self.extract.reference(source, cache)

    @torch.inference_mode()
    def __call__(self, module: ConsistencyModule, codec: LatentCodec) -> float:
        model, size = module.text_to_image(codec), 64
        values = []
        for w in self.w:
            batches = model.images(self.prompts, list(range(len(self.prompts))), steps=self.steps, w=w, batch_size=size)
            features = joined([self.extract(x, self.prompts[size * i :][: len(x)]) for i, x in enumerate(batches)])
            values.append(scores(features, {"real": self.real}, {"FID": METRIC})["FID"])
        return min(values)


class Timeline(L.Callback):
    """Measures the FID of a student after each of `minutes` of training. The time of the measurement does not count."""

    def __init__(self, name: str, minutes: list[float], judge: Judge, codec: LatentCodec) -> None:
        self.name, self.minutes, self.judge, self.codec = name, sorted(minutes), judge, codec
        self.rows: list[dict[str, Any]] = []
        self.start = now()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.start = now()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        trainer.should_stop = self.passed(module, trainer.global_step)

    def passed(self, module: ConsistencyModule, step: int) -> bool:
        """Measure the student if the next of `minutes` has passed. Return whether it was the last."""
        if time.perf_counter() - self.start < 60 * self.minutes[len(self.rows)]:
            return False
        paused = now()
        row = {
            "recipe": self.name,
            "minutes": self.minutes[len(self.rows)],
            "steps": step,
            "FID": self.judge(module, self.codec),
        }
        self.rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
        self.start += now() - paused
        return len(self.rows) == len(self.minutes)


def train(name: str, overrides: list[str], minutes: list[float], judge: Judge) -> list[dict[str, Any]]:
    """Train as `train.py` does, and return the rows of the table."""
    cfg = compose("train", overrides)
    data, module = build(cfg.data), build(cfg.model)
    timeline = Timeline(name, minutes, judge, data.codec)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    L.Trainer(**{**build(cfg.trainer), **silent}, callbacks=[timeline]).fit(module, data)
    if len(timeline.rows) < len(minutes):
        raise UserError(f"{name} ended before {max(minutes):g} minutes: set a larger trainer.max_steps in part.quality.ours")
    return timeline.rows


def train_peer(name: str, overrides: list[str], lr: float, minutes: list[float], judge: Judge) -> list[dict[str, Any]]:
    """Train as the peers' script does and return the rows. The script has no average, so `net` is measured.

    The precision is that of `train.py`, because bfloat16 is slow on some CPUs.
    """
    cfg = compose("train", [*overrides, "model.eval_ema=null"])
    data, module, device = build(cfg.data), build(cfg.model), pick_device("auto")
    dtype = torch.bfloat16 if str(cfg.trainer.precision).startswith("bf16") else torch.float32
    for tower in data.codec.text.encoders:
        tower.to(dtype)
    for network in (module, module.frozen["teacher"], data.codec.vae, data.codec.text):
        network.to(device)
    batches: Iterator[Any] = peers.image_loader(
        expand_urls(cfg.data.shards),
        captions=dict(cfg.data.captions),
        size=data.resolution,
        batch_size=data.batch_size,
        workers=data.num_workers,
    )
    step, timeline = peers.distillation_step(module, data.codec, dtype, lr), Timeline(name, minutes, judge, data.codec)
    for number, batch in zip(count(1), batches, strict=False):
        step(*batch)
        if timeline.passed(module, number):
            break
    return timeline.rows


def measure(
    *,
    base: list[str],
    ours: dict[str, list[str]],
    peers: list[str],
    learning_rates: list[float],
    minutes: list[float],
    steps: int,
    shards: str,
    captions: dict[str, float],
    resolution: int,
    samples: int,
    w: list[float],
    cache: str,
) -> Table:
    """Return the FID of each recipe after each of `minutes`.

    base: overrides of `train.py` for all recipes. ours: further overrides of each recipe, by name. peers: further overrides for
    the script. The other arguments are those of `Judge`.
    """
    judge = Judge(shards, captions, resolution=resolution, samples=samples, steps=steps, w=w, cache=cache)
    rows = [row for name, overrides in ours.items() for row in train(name, [*base, *overrides], minutes, judge)]
    for lr in learning_rates:
        rows += train_peer(f"diffusers' script, lr {lr:g}", [*base, *peers], lr, minutes, judge)
    named = [{"name": row["recipe"], "w": None, **row} for row in rows]
    picture = plot(named, {"FID": METRIC}, "minutes", lambda row: row["name"])
    note = (
        f"FID at {steps} steps of {len(judge.prompts)} held-out captions, the lowest of w = {judge.w}. The time of the "
        f"measurement does not count. {torch.get_num_threads()} threads. The script's recipe: {' '.join(peers)}."
    )
    return Table("Time to quality", rows, note, picture)
