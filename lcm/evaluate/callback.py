"""FID and CLIP score during training, by the code of `python -m lcm.evaluate`."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from torch import Tensor

from lcm.core.errors import NonFiniteError, UserError
from lcm.core.numbers import Count, Limit, Seed
from lcm.data.captions import read_captions
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.features import DISTANCES, Extractor, Features, scores
from lcm.evaluate.inception import InceptionBackbone
from lcm.models.text_to_image import TextToImage

log = logging.getLogger(__name__)
LOWER = tuple(f"val/{metric}_" for metric in DISTANCES)  # is better


class Evaluation(L.Callback):
    """Every `every_n_steps` optimizer steps, and at the end, draws `samples` captions of `shards` at each of `steps`.

    Logs `val/<metric>_<steps>_steps` against all images of `shards`, which are filtered and cached as the data's; with `_raw`
    appended for the trained network beside its average. Images that are not finite give a warning and no metric.

    resolution: the size at which images are drawn and compared; None: that of the training.

    keep_best: the metric, such as `val/fid_4_steps`, by which the best checkpoint so far is kept as `folder`/best.ckpt: a high
    score, a low distance.

    A time costs `samples` x the sum of `steps` network calls (twice for a guided teacher, twice with an average), shared out
    over the ranks. The backbones are no part of the module: no checkpoint, average or optimizer sees them.
    """

    def __init__(
        self,
        shards: str | list[str],
        *,
        backbone: ClipBackbone,
        reference_cache: str,
        steps: list[Count],
        w: float,
        resolution: Count | None = None,
        samples: Annotated[int, Limit(2)] = 128,
        every_n_steps: Count = 1000,
        metrics: Sequence[str] = ("fid", "clip_score"),
        fid_backbone: ClipBackbone | InceptionBackbone | None = None,
        batch_size: Count = 64,
        seed: Seed = 0,
        keep_best: str | None = None,
        folder: str = "",
    ) -> None:
        if not shards:
            raise UserError("evaluation during training needs captions and images: set data.val_shards")
        self.backbone, self.fid_backbone, self.resolution = backbone, fid_backbone, resolution
        self.shards, self.reference_cache = shards, reference_cache
        self.steps, self.w, self.samples, self.metrics = steps, w, samples, metrics
        self.every_n_steps, self.batch_size, self.seed = every_n_steps, batch_size, seed
        self.keep_best, self.best_file = keep_best, Path(folder, "best.ckpt")
        self.best = float("inf")
        self.real: Features = {}
        self.captions: list[str] = []
        self.last = 0

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        names = [f"val/{metric}_{steps}_steps" for metric in self.metrics for steps in self.steps]
        if self.keep_best not in (None, *names):
            raise UserError(f"callbacks.evaluation.keep_best={self.keep_best} is not measured: choose of {', '.join(names)}")
        if self.shards is None:
            raise UserError("the evaluation compares with real images, but data.val_shards is null: set it to your shards")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        resolution = self.resolution or data.resolution
        module.text_to_image(data.codec).size(resolution, "callbacks.evaluation.resolution")
        self.extract = Extractor(self.backbone, self.fid_backbone, resolution=resolution).to(module.device)
        source = data.reader(self.shards, "callbacks.evaluation.shards")
        known = read_captions(source, self.samples)
        if not known:
            raise UserError(f"{self.shards} hold no captions: give others with callbacks.evaluation.shards")
        self.captions = [known[i % len(known)] for i in range(self.samples)]
        if trainer.is_global_zero:
            self.real = self.extract.reference(source, self.reference_cache, "callbacks.evaluation.reference_cache")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.evaluate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.evaluate(trainer, module)

    def evaluate(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.global_step == self.last:
            return
        self.last = trainer.global_step
        model = module.text_to_image(trainer.datamodule.codec)  # type: ignore[attr-defined]
        models = {"": model} if model.net is module.net else {"": model, "_raw": replace(model, net=module.net)}
        values: dict[str, float] = {}
        for suffix, one in models.items():
            for steps in self.steps:
                names = {metric: f"val/{metric}_{steps}_steps{suffix}" for metric in self.metrics}
                features = self.features(trainer, one, steps)
                for name in names.values():
                    trainer.callback_metrics.pop(name, None)
                if features is not None and trainer.is_global_zero:
                    values |= {names[metric]: value for metric, value in scores(features, self.real, self.metrics).items()}
        values = trainer.strategy.broadcast(values)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if self.keep_best in values:
            value = values[self.keep_best] * (1 if self.keep_best.startswith(LOWER) else -1)
            if value < self.best:  # the same on all ranks; before last.ckpt is written, which then knows it
                self.best = value
                trainer.save_checkpoint(self.best_file)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "metric": self.keep_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("metric", self.keep_best) == self.keep_best:  # the best of another metric is no measure
            self.best = state_dict["best"]

    def features(self, trainer: L.Trainer, model: TextToImage, steps: int) -> Features | None:
        """Of all captions, on every rank: rank r of R draws r, r + R, ...; the last ones twice where R does not divide them, so
        that all ranks bring as much to the gathering. None where an image of any rank is not finite."""
        world, rank = trainer.world_size, trainer.global_rank
        mine = [i % self.samples for i in range(rank, -(-self.samples // world) * world, world)]
        options: dict[str, Any] = {"steps": steps, "w": self.w, "size": self.extract.resolution, "batch_size": self.batch_size}
        parts: list[Features] = []
        failure: NonFiniteError | None = None
        for i in range(0, len(mine), self.batch_size):  # to the end, since a sharded network is run by all ranks together
            part = mine[i : i + self.batch_size]
            captions = [self.captions[i] for i in part]
            try:
                parts.append(self.extract(next(model.images(captions, [self.seed + i for i in part], **options)), captions))
            except NonFiniteError as error:
                failure = error
        if failure is not None:
            log.warning("no metrics of %d sampling steps at step %d: %s", steps, trainer.global_step, failure)
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            return None
        return {name: self.gathered(trainer, torch.cat([part[name] for part in parts])) for name in parts[0]}

    def gathered(self, trainer: L.Trainer, own: Tensor) -> Tensor:
        every = trainer.strategy.all_gather(own.to(trainer.strategy.root_device))
        return every.reshape(trainer.world_size, *own.shape).transpose(0, 1).flatten(0, 1)[: self.samples].cpu()
