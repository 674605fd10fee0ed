"""Rates of a training: `perf/images_per_sec`, `perf/tflops`, `perf/mfu` and `perf/data_wait`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from lcm.core.numbers import Count, Positive
from lcm.models.flops import call_flop, matmul_tflops
from lcm.modules.training_length import TrainingLength


class Throughput(TrainingLength):
    """Log the rates since the last log whenever the trainer logs. Validation, image grids and metrics do not count.

    - `perf/images_per_sec`: images per second of all devices together.
    - `perf/tflops`: TFLOP/s of one device. It counts the matmuls, convolutions and attention of the algorithm, but not
      recomputed activations.
    - `perf/mfu`: `perf/tflops` as a share of `peak_tflops`. Its default is the rate of a matmul of `matmul_size`, measured at
      the start in the precision of the training. matmul_size: by default 2048 on a CPU, 8192 on a GPU.
    - `perf/data_wait`: the share of the time in which no step runs: for reading and, on a CPU, encoding.

    No measurement synchronises the device during training.
    """

    def __init__(self, peak_tflops: Positive | None = None, matmul_size: Count | None = None) -> None:
        super().__init__()
        self.peak, self.matmul_size = peak_tflops, matmul_size
        self.flop_per_image: float | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if self.peak is None:
            size = self.matmul_size or (2048 if module.device.type == "cpu" else 8192)
            dtype = torch.bfloat16 if trainer.precision.startswith("bf16") else torch.float32
            self.peak = matmul_tflops(module.device, dtype, size)
        module.calls = []  # the calls of the first batch are recorded
        self.step = trainer.global_step
        self.restart()

    def restart(self) -> None:
        self.images, self.seconds, self.waited, self.started = 0, 0.0, 0.0, time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.started  # since the end of the previous batch

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if self.flop_per_image is None:  # the first batch warms up and is not timed
            size = self.images / trainer.world_size
            self.flop_per_image = sum(call_flop(module.family, *call) for call in module.calls) / size
            module.calls = None
            return self.restart()
        if trainer.global_step > self.step and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.step = trainer.global_step
            self.log_rates(trainer.world_size, module)
            self.restart()

    def log_rates(self, devices: int, module: Any) -> None:
        images_per_sec = self.images / self.seconds
        module.log("perf/images_per_sec", images_per_sec, prog_bar=True)
        rates = {"data_wait": self.waited / self.seconds}
        if self.flop_per_image and self.peak:
            tflops = images_per_sec / devices * self.flop_per_image / 1e12
            rates |= {"tflops": tflops, "mfu": tflops / self.peak}
        module.log_dict({f"perf/{name}": value for name, value in rates.items()})


@contextmanager
def not_timed(trainer: L.Trainer) -> Iterator[None]:
    """Leave the time of the context out of a training's rates and length. It would count as time that waits for data."""
    started = time.perf_counter()
    yield
    for callback in trainer.callbacks if trainer.training else ():  # type: ignore[attr-defined]
        if (leave_out := getattr(callback, "leave_out", None)) is not None:
            leave_out(time.perf_counter() - started)
