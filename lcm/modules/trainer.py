"""Lightning's Trainer, limited to the settings that the modules here support."""

from collections.abc import Sequence
from typing import Annotated, Any

import lightning as L
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar

from lcm.core.errors import UserError
from lcm.core.numbers import Count, Limit, Positive

PRECISIONS = ("32-true", "bf16-mixed", "32", "bf16")


class Trainer(L.Trainer):
    """A Trainer that raises UserError for settings that the modules do not support, and for Lightning's own refusals.

    precision: one of `PRECISIONS`. "16-mixed" would scale losses, which clipping and the non-finite guard do not handle.
    "bf16-true" would round averages, which then stop changing with mu near 1.
    enable_progress_bar: False removes the progress bar from `callbacks`.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        precision: str = "32-true",
        max_steps: Annotated[int, Limit(-1)] = -1,
        log_every_n_steps: Count = 10,
        accumulate_grad_batches: Count = 1,
        val_check_interval: Positive | str | None = None,
        enable_progress_bar: bool = True,
        callbacks: Sequence[Callback] = (),
        **kwargs: Any,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(
                f"trainer.precision={precision}: use one of {', '.join(PRECISIONS)}; float16 needs scaled losses, which "
                "clipping does not support, and 16-bit weights would round the averages"
            )
        gpus = {"gpu": (CUDAAccelerator, MPSAccelerator), "cuda": (CUDAAccelerator,), "mps": (MPSAccelerator,)}
        if accelerator in gpus and not any(gpu.is_available() for gpu in gpus[accelerator]):
            raise UserError(
                f"trainer.accelerator={accelerator}: torch finds no such device: train on another machine, or on the CPU with "
                "trainer=default trainer.accelerator=cpu"
            )
        if not enable_progress_bar:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        try:
            super().__init__(
                accelerator=accelerator,
                precision=precision,  # type: ignore[arg-type]
                max_steps=max_steps,
                log_every_n_steps=log_every_n_steps,
                accumulate_grad_batches=accumulate_grad_batches,
                val_check_interval=val_check_interval,  # type: ignore[arg-type]
                enable_progress_bar=enable_progress_bar,
                callbacks=list(callbacks),
                **kwargs,
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
