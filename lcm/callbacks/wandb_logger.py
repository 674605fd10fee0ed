"""Weights & Biases, without which training goes on."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lcm.core.errors import UserError
from lcm.runtime import signals

log = logging.getLogger(__name__)


@contextmanager
def left_out() -> Iterator[None]:
    """Whether or not this process has heard of the signal yet that has ended wandb's."""
    try:
        yield
    except Exception as error:
        if not signals.asked():
            log.warning("wandb has ended, nothing more is logged there (%s)", error)


class WandbLogger(LightningWandbLogger):
    """Lightning's; where the service does not answer within `settings.init_timeout` seconds the run is kept on disk.

    settings: wandb's, such as `finish_timeout`, how many seconds the end waits for the service.

    A SIGTERM from SLURM goes to wandb's own process, too, which then ends: what comes after is not logged, and training goes on
    to the end of the step and saves.
    """

    def __init__(
        self,
        *,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        texts: dict[str, Any] = {"entity": entity, "group": group, "job_type": job_type, "notes": notes, "tags": tags}
        super().__init__(**{name: value for name, value in texts.items() if value is not None}, **kwargs)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with left_out():
            super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "requeued" and self._experiment is not None:
            import wandb

            for close in (self._experiment.finish, wandb.teardown):
                with left_out():
                    close()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is not None:
            return self._experiment
        import wandb
        from wandb.errors import AuthenticationError, CommError, UsageError

        try:
            return super().experiment
        except (AuthenticationError, UsageError) as error:
            raise UserError(
                f"wandb refuses ({' '.join(str(error).split())}): set WANDB_API_KEY or keep the run on disk with "
                "logger.wandb.offline=true"
            ) from error
        except CommError:
            wandb.teardown()  # the attempt holds the run's id
            self._wandb_init["mode"] = "offline"
            run = super().experiment
            print(
                "warning: wandb does not answer: the run is kept on disk, send it later with "
                f"`wandb sync {run.settings.sync_dir}`",
                file=sys.stderr,
                flush=True,
            )
            return run
