"""One progress line over optimizer steps: what is done, how fast, when it ends."""

import sys
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class Progress(ProgressBar):
    """Lightning's bars count batches of an epoch; these streams are endless, so this one counts steps up to `max_steps`."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None

    def disable(self) -> None:
        self.bar = None

    def enable(self) -> None: ...

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.bar = tqdm(
            desc="training",
            initial=trainer.global_step,
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        self.started, self.images = time.monotonic(), 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None:
            return
        self.images += trainer.world_size * len(batch["x"] if isinstance(batch, dict) else batch)
        if trainer.global_step > self.bar.n:
            metrics = {k: f"{float(v):.4g}" for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
            rate = self.images / (time.monotonic() - self.started)
            if trainer.global_step % trainer.log_every_n_steps == 0:
                self.bar.set_postfix({**metrics, "images/s": f"{rate:.1f}"}, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.bar is not None:
            self.bar.close()
