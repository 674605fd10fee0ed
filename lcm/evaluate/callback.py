"""Metrics during training, computed as `python -m lcm.evaluate` computes them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torchmetrics.utilities.distributed import gather_all_tensors

from lcm.app.images import steps_label
from lcm.callbacks.throughput import not_timed
from lcm.callbacks.wandb_logger import WandbLogger, log_model, model_loggers
from lcm.core.errors import NonFiniteError, UserError
from lcm.core.numbers import Count, Limit, Seed
from lcm.data.captions import read_captions
from lcm.evaluate.clip import ClipBackbone
from lcm.evaluate.features import Extractor, joined, without_rewards
from lcm.evaluate.inception import InceptionBackbone
from lcm.evaluate.metrics import FeatureMetric, Features, Score, scores
from lcm.models.text_to_image import TextToImage
from lcm.runtime.atomic_io import remove

log = logging.getLogger(__name__)


class Evaluation(L.Callback):
    """Draw `samples` captions of `shards` at each of `steps`, every `every_n_steps` optimizer steps and at the end.

    Logs `val/<metric>_<steps>_steps` for the averaged network. If there is an average, the trained network has the same names
    with `_raw` appended. The real images are those of `shards`, filtered and cached as the training data is. Non-finite images
    cause a warning and no metric. A score that a training raised as its reward is left out. The cost is `samples` x the sum of
    `steps` network calls, divided among the ranks. It doubles for a guided teacher, and again with an average. The backbones
    are not part of the module or its checkpoints.

    resolution: pixels per side at which images are drawn and compared; None: the size of the training. keep_best: a logged
    name, such as `val/fid_4_steps`, whose best checkpoint is saved as `folder`/best.ckpt.
    """

    def __init__(
        self,
        shards: str | list[str],
        *,
        backbone: ClipBackbone,
        metrics: Mapping[str, FeatureMetric | Score],
        reference_cache: str,
        steps: list[Count],
        w: float,
        resolution: Count | None = None,
        samples: Annotated[int, Limit(2)] = 128,
        every_n_steps: Count = 1000,
        fid_backbone: ClipBackbone | InceptionBackbone | None = None,
        batch_size: Count = 64,
        seed: Seed = 0,
        keep_best: str | None = None,
        folder: str = "",
    ) -> None:
        if not shards:
            raise UserError("evaluation during training needs captions and images: set data.val_shards")
        self.backbone, self.fid_backbone, self.resolution = backbone, fid_backbone, resolution
        self.shards, self.reference_cache, self.metrics = shards, reference_cache, metrics
        self.steps, self.w, self.samples = steps, w, samples
        self.every_n_steps, self.batch_size, self.seed = every_n_steps, batch_size, seed
        self.keep_best, self.best_file = keep_best, Path(folder, "best.ckpt")
        self.best: float | None = None
        self.history: dict[str, dict[str, dict[int, float]]] = {}  # values by metric, curve and training step
        self.real: Features = {}
        self.captions: list[str] = []
        self.last_step = 0
        if others := [name for name, metric in metrics.items() if metric.against in ("teacher", "prompt", "time")]:
            raise UserError(
                f"callbacks.evaluation.metrics={others} cannot be measured during training: leave them out, and use "
                "python -m lcm.evaluate for them"
            )
        directions = {f"val/{name}_{n}_steps": metric.lower_is_better for name, metric in metrics.items() for n in steps}
        if keep_best is not None and keep_best not in directions:
            raise UserError(f"callbacks.evaluation.keep_best={keep_best} is not measured: choose from {', '.join(directions)}")
        self.lower_is_better = directions.get(keep_best or "", True)

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        resolution = self.resolution or data.resolution
        model = module.text_to_image(data.codec)
        model.size(resolution, "callbacks.evaluation.resolution")
        networks = [metric for metric in self.metrics.values() if isinstance(metric, Score)]
        self.extract = Extractor(self.backbone, self.fid_backbone, resolution=resolution, scores=networks).to(module.device)
        self.leave_out_rewards(model.metadata.get("rewards", []))
        source = data.make_source(self.shards, "callbacks.evaluation.shards")
        captions = read_captions(source, self.samples)
        if not captions:
            raise UserError(f"{self.shards} hold no captions: give others with callbacks.evaluation.shards")
        self.captions = [captions[i % len(captions)] for i in range(self.samples)]
        if trainer.is_global_zero:
            self.real = self.extract.reference(source, self.reference_cache, "callbacks.evaluation.reference_cache")

    def leave_out_rewards(self, rewards: list[dict[str, Any]]) -> None:
        """Leave out the scores that a training raises. Raises UserError if `keep_best` is one of them."""
        kept = without_rewards(self.metrics, self.extract, rewards)
        left_out = {name: metric for name, metric in self.metrics.items() if name not in kept}
        for name, metric in left_out.items():
            if self.keep_best in {f"val/{name}_{n}_steps" for n in self.steps}:
                raise UserError(
                    f"callbacks.evaluation.keep_best={self.keep_best} is the reward of this training: choose a metric that the "
                    "training does not raise, such as fid"
                )
            rank_zero_only(log.warning)("%s is left out: a training raised this score as its reward.", metric.title)
        self.metrics = kept

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            with not_timed(trainer):
                self.evaluate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.evaluate(trainer, module)

    def evaluate(self, trainer: L.Trainer, module: Any) -> None:
        """Draw, measure and log, at most once for a step. Save the best checkpoint."""
        if trainer.global_step == self.last_step or not self.metrics:
            return
        self.last_step = trainer.global_step
        model = module.text_to_image(trainer.datamodule.codec)  # type: ignore[attr-defined]
        models = {"": model} if model.net is module.net else {"": model, "_raw": replace(model, net=module.net)}
        values: dict[str, float] = {}
        for suffix, model in models.items():
            for steps in self.steps:
                names = {metric: f"val/{metric}_{steps}_steps{suffix}" for metric in self.metrics}
                for name in names.values():
                    trainer.callback_metrics.pop(name, None)
                features = self.features(trainer, model, steps)
                if features is not None and trainer.is_global_zero:
                    measured = scores(features, {"real": self.real}, self.metrics)
                    values |= {names[metric]: value for metric, value in measured.items()}
                    curve = f"{steps_label(steps)}{suffix.replace('_', ', ')}"
                    for metric, value in measured.items():
                        self.history.setdefault(metric, {}).setdefault(curve, {})[trainer.global_step] = value
        values = trainer.strategy.broadcast(values)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                for metric, curves in self.history.items():
                    logger.log_curves(metric, curves, trainer.global_step)
        if self.keep_best in values and self.is_best(values[self.keep_best]):
            self.best = values[self.keep_best]  # set on all ranks, and before last.ckpt is written
            trainer.save_checkpoint(self.best_file)
            if model_loggers(trainer.loggers):
                folder = self.best_file.with_name("best_model")
                module.save_model(str(folder))
                if trainer.is_global_zero:
                    log_model(trainer.loggers, folder, "best")
                    remove(folder)

    def is_best(self, value: float) -> bool:
        return self.best is None or (value < self.best if self.lower_is_better else value > self.best)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "metric": self.keep_best, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict.get("history", {})
        if state_dict.get("metric") == self.keep_best:  # the best value of another metric means nothing here
            self.best = state_dict["best"]

    def features(self, trainer: L.Trainer, model: TextToImage, steps: int) -> Features | None:
        """Return the features of all samples, on every rank. Return None if an image of any rank is not finite.

        Every rank draws the same number of images, because the ranks run a sharded network together. If the world size does not
        divide `samples`, the last ranks draw some captions again and drop their features.
        """
        count = -(-self.samples // trainer.world_size)
        start = count * trainer.global_rank
        kept = min(max(self.samples - start, 0), count)
        options: dict[str, Any] = {"steps": steps, "w": self.w, "size": self.extract.resolution, "batch_size": self.batch_size}
        parts: list[Features] = []
        failure: NonFiniteError | None = None
        for first in range(start, start + count, self.batch_size):
            numbers = [i % self.samples for i in range(first, min(first + self.batch_size, start + count))]
            captions = [self.captions[i] for i in numbers]
            try:
                images = next(model.images(captions, [self.seed + i for i in numbers], **options))
                parts.append(self.extract(images, captions))
            except NonFiniteError as error:
                failure = error
        if failure is not None:
            log.warning("no metrics of %d sampling steps at step %d: %s", steps, trainer.global_step, failure)
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            return None
        features = {name: values[:kept] for name, values in joined(parts).items()}
        if trainer.world_size == 1:
            return features
        # The features are gathered, not the metrics: the state of FID alone is 32 MiB per rank with InceptionV3.
        device = trainer.strategy.root_device
        return {name: torch.cat(gather_all_tensors(values.to(device))).cpu() for name, values in features.items()}
