"""The length of a training: its images and seconds, over all its resumes."""

import time
from typing import Any

import lightning as L


class TrainingLength(L.Callback):
    """Counts the images of all ranks, and the seconds of training. Validation, image grids and metrics do not count.

    A latent module saves both counts in its checkpoints.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.seconds, self.started = self.seconds + now - self.started, now
        self.images += len(batch["x"] if isinstance(batch, dict) else batch) * trainer.world_size

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        self.started += seconds
