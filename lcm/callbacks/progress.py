"""A progress line over optimizer steps: step, rate, time left and metrics."""

import sys
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class Progress(ProgressBar):
    """Count optimizer steps up to `max_steps`, also after a resume, on a terminal and in a log file.

    Lightning's bars count the batches of an epoch. A stream has no end, so after a resume those bars show no time left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None

    def disable(self) -> None:
        """Do nothing: Lightning disables the bars of ranks above 0, which have no bar here."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                desc="training",
                initial=trainer.global_step,
                total=trainer.max_steps if trainer.max_steps > 0 else None,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds; a log file gets one line every 10 seconds
            )

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:
            metrics = {name.removeprefix("perf/"): value for name, value in trainer.progress_bar_metrics.items()}
            metrics.pop("v_num", None)
            self.bar.set_postfix({name: f"{float(value):.4g}" for name, value in metrics.items()}, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        if self.bar is None and trainer.is_global_zero and 0 < trainer.max_steps <= trainer.global_step:
            step = f"the checkpoint is at step {trainer.global_step} of trainer.max_steps={trainer.max_steps}"
            print(f"done:    {step}: set a larger number to continue", flush=True)
