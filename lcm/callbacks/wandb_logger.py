"""Weights & Biases. A failure of the service does not stop a training."""

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
def ignore_errors() -> Iterator[None]:
    """Warn of an error. After a stop signal ignore it: the signal also ends the process of wandb."""
    try:
        yield
    except Exception as error:
        if not signals.asked():
            log.warning("wandb has stopped, so it logs nothing more (%s)", error)


class WandbLogger(LightningWandbLogger):
    """Lightning's logger, which also works without the service: it then logs to disk.

    It goes offline if the service does not answer within `settings.init_timeout` seconds. A SIGTERM from SLURM also ends the
    process of wandb. Later metrics are not logged there, while the training finishes its step and saves.

    settings: of wandb, such as `finish_timeout`: seconds to wait for the service at the end.
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
        with ignore_errors():
            super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "requeued" and self._experiment is not None:
            import wandb

            for close in (self._experiment.finish, wandb.teardown):
                with ignore_errors():
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
                f"wandb refuses ({' '.join(str(error).split())}): set WANDB_API_KEY, or log to disk with "
                "logger.wandb.offline=true"
            ) from error
        except CommError:
            wandb.teardown()  # the failed attempt holds the run's id
            self._wandb_init["mode"] = "offline"
            run = super().experiment
            print(
                "warning: wandb does not answer, so it logs to disk: send the run later with "
                f"`wandb sync {run.settings.sync_dir}`",
                file=sys.stderr,
                flush=True,
            )
            return run
