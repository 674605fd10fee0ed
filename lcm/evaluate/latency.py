"""Seconds per image on this device."""

import statistics
import time
from dataclasses import dataclass
from typing import Literal

from lcm.core.numbers import Count
from lcm.evaluate.jobs import Job


@dataclass(frozen=True)
class Latency:
    """The seconds per image from prompt to picture: text encoder, network and decoder.

    The value is the median of `repeats` batches of `batch_size` images, after a batch as warm-up.
    """

    title: str
    batch_size: Count = 1
    repeats: Count = 5
    lower_is_better: bool = True
    against: Literal["time"] = "time"

    def measure(self, job: Job, prompt: str) -> float:
        """Return the seconds per image of a job."""

        def batch() -> float:
            start = time.perf_counter()
            [images] = job.model.images(prompts, seeds, batch_size=self.batch_size, **job.options)
            images.cpu()  # waits for the device
            return (time.perf_counter() - start) / self.batch_size

        prompts, seeds = [prompt] * self.batch_size, list(range(self.batch_size))
        batch()
        return statistics.median(batch() for _ in range(self.repeats))
