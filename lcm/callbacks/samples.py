"""Image grids during training: the same prompts and seeds every time, one column per step count."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lcm.app.images import columns_to_rows, grid, log_picture, steps_label
from lcm.callbacks.throughput import not_timed
from lcm.callbacks.wandb_logger import WandbLogger
from lcm.core.errors import NonFiniteError, UserError
from lcm.core.numbers import Count, Seed

log = logging.getLogger(__name__)


class ImageGrid(L.Callback):
    """Draw `prompts` at each of `steps` every `every_n_steps` optimizer steps, at the start and at the end.

    Write each grid to `folder/step-000100.png` and to every logger that takes images. At the end `folder/history.png` shows the
    pictures of the last of `steps` from all grids side by side. Pictures have the size of the training. If a picture is not
    finite, the grid is skipped with a warning. w: guidance weight.
    """

    def __init__(
        self, folder: str, prompts: list[str], *, steps: list[Count], w: float, every_n_steps: Count = 500, seed: Seed = 0
    ) -> None:
        if isinstance(prompts, str):
            raise UserError(f"callbacks.samples.prompts={prompts}: give a list of prompts, as [red apple, blue chair]")
        self.folder, self.prompts, self.steps, self.w = Path(folder), [str(prompt) for prompt in prompts], steps, w
        self.every_n_steps, self.seeds = every_n_steps, [seed + i for i in range(len(prompts))]
        self.history: dict[int, Tensor] = {}
        self.last = -1

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.draw(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            with not_timed(trainer):
                self.draw(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.draw(trainer, module)
        if self.history and trainer.is_global_zero:
            labels = [f"trained\n{step} steps" for step in self.history]
            grid(columns_to_rows(list(self.history.values())), self.prompts, labels).save(self.folder / "history.png")

    def draw(self, trainer: L.Trainer, module: Any) -> None:
        """Draw, save and log a grid, at most once for a step."""
        step = trainer.global_step
        if step == self.last or not (trainer.is_global_zero or module.device_mesh is not None):
            return  # all ranks run a sharded network together
        self.last = step
        model = module.text_to_image(trainer.datamodule.codec)  # type: ignore[attr-defined]
        options: dict[str, Any] = {"w": self.w, "batch_size": len(self.prompts)}
        try:
            columns = [next(model.images(self.prompts, self.seeds, steps=n, **options)) for n in self.steps]
        except NonFiniteError as error:
            log.warning("no image grid at step %d: %s", step, error)
            return
        self.history[step] = columns[-1].cpu()
        if not trainer.is_global_zero:
            return
        picture = grid(columns_to_rows(columns), self.prompts, [steps_label(n) for n in self.steps])
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"step-{step:06d}.png")
        for logger in trainer.loggers:
            log_picture(logger, "val/samples", picture, step)
            if isinstance(logger, WandbLogger):
                logger.log_samples(self.prompts, dict(zip(self.steps, columns, strict=True)), step)
