"""One progress line over optimizer steps: what is done, how fast, when it ends."""

import sys
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
        if not trainer.is_global_zero:
            return
        self.bar = tqdm(
            desc="training",
            initial=trainer.global_step,
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None:
            return
        if trainer.global_step > self.bar.n:
            if trainer.global_step % trainer.log_every_n_steps == 0:
                shown = {name.removeprefix("perf/"): value for name, value in trainer.progress_bar_metrics.items()}
                shown.pop("v_num", None)
                self.bar.set_postfix({name: f"{float(value):.4g}" for name, value in shown.items()}, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        if self.bar is None and trainer.is_global_zero and 0 < trainer.max_steps <= trainer.global_step:
            step = f"the checkpoint is at step {trainer.global_step}, of trainer.max_steps={trainer.max_steps}"
            print(f"done:    {step}: a larger number trains on", flush=True)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.bar is not None:
            self.bar.close()
