"""Weights & Biases. A failure of the service does not stop a training."""

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lcm.app.images import steps_label, to_pil
from lcm.core.errors import UserError
from lcm.core.numbers import Count, PositiveShare
from lcm.data.datamodule import IMAGES_SEEN
from lcm.runtime import signals
from lcm.runtime.redaction import redacted

log = logging.getLogger(__name__)
UPLOAD = 600  # seconds to wait for the upload of a trained model


@contextmanager
def ignore_errors() -> Iterator[None]:
    """Warn of an error. After a stop signal ignore it: the signal also ends the process of wandb."""
    try:
        yield
    except Exception as error:
        if not signals.recorded_signal():
            log.warning("wandb has stopped and logs nothing more (%s)", error)


class WandbLogger(LightningWandbLogger):
    """Lightning's logger, with the images seen as the axis of the curves.

    If the service does not answer within `settings.init_timeout` seconds, the run is logged to disk. A SIGTERM from SLURM also
    ends the process of wandb. The training then finishes its step and saves, but logs nothing more to wandb.

    - Alerts: a non-finite value or a skipped step of the training, data waits above `data_wait_alert`, and an error that ends
      the training.
    - Artifact `model-<run id>`: pipeline folders, by alias `last` and `best`. `log_model=false` turns it off.
    - settings: settings of wandb, such as `finish_timeout`, the seconds to wait for the service at the end.
    """

    def __init__(
        self,
        *,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        tags: list[str] | None = None,
        log_model: bool = True,
        data_wait_alert: PositiveShare = 0.5,
        **kwargs: Any,
    ) -> None:
        texts: dict[str, Any] = {"entity": entity, "group": group, "job_type": job_type, "notes": notes, "tags": tags}
        super().__init__(**{name: value for name, value in texts.items() if value is not None}, **kwargs)
        self._wandb_init.pop("anonymous")  # an argument of Lightning that wandb warns of
        self.log_model, self.data_wait_alert = log_model, data_wait_alert
        self.images_seen: Count = 0  # set by the data module
        self.skipped = 0.0
        self.table: Any = None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with ignore_errors():
            super().log_metrics({**metrics, IMAGES_SEEN: self.images_seen}, step)
            self.send_alerts(metrics, step)

    @rank_zero_only
    def send_alerts(self, metrics: Mapping[str, Any], step: int | None) -> None:
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        not_finite = [name for name, value in numbers.items() if not math.isfinite(value)]
        skipped = numbers.get("train/skipped_steps", self.skipped)
        if not_finite or skipped > self.skipped:
            text = f"step {step}: {', '.join(not_finite) or 'a gradient'} is not finite, {skipped:.0f} steps were skipped"
            self.alert("Non-finite loss", text)
        self.skipped = skipped
        if (waited := numbers.get("perf/data_wait", 0.0)) > self.data_wait_alert:
            self.alert(
                "Stalled data", f"step {step}: the training waits for data {waited:.0%} of its time: see docs/performance.md"
            )

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Send an alert, of each title at most one an hour."""
        self.experiment.alert(title, redacted(text), level=level, wait_duration=3600)

    @rank_zero_only
    def log_samples(self, prompts: Sequence[str], columns: Mapping[int, Tensor], step: int) -> None:
        """Add a row for each prompt to the table `val/prompts`. columns: uint8 `[prompts, 3, H, W]` by sampling steps."""
        import wandb

        with ignore_errors():
            if self.table is None:
                names: list[str | int] = ["training step", "images seen", "prompt", *map(steps_label, columns)]
                self.table = wandb.Table(names, log_mode="INCREMENTAL")
            for row, prompt in enumerate(prompts):
                pictures = [wandb.Image(to_pil(images[row])) for images in columns.values()]
                self.table.add_data(step, self.images_seen, redacted(prompt), *pictures)
            self.log_object("val/prompts", self.table, step)

    @rank_zero_only
    def log_curves(self, name: str, curves: Mapping[str, Mapping[int, float]], step: int) -> None:
        """Log one chart of several curves: values by training step."""
        import wandb

        with ignore_errors():
            axes = [list(values) for values in curves.values()], [list(values.values()) for values in curves.values()]
            chart = wandb.plot.line_series(*axes, keys=list(curves), title=f"{name} by sampling steps", xname="training step")
            self.log_object(f"charts/{name}", chart, step)

    def log_object(self, name: str, value: Any, step: int) -> None:
        super().log_metrics({name: value, IMAGES_SEEN: self.images_seen}, step)

    def log_folder(self, folder: str | Path, alias: str, *, wait: bool = False) -> None:
        """Log a pipeline folder as a version of the model's artifact. wait: wait for the end of the upload."""
        import wandb

        with ignore_errors():
            artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata={"images_seen": self.images_seen})
            artifact.add_dir(str(folder), skip_cache=True)
            self.experiment.log_artifact(artifact, aliases=[alias])
            if wait and not self.experiment.offline:
                artifact.wait(UPLOAD)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is None:
            return
        if status == "failed" and isinstance(error := sys.exc_info()[1], Exception):
            with ignore_errors():
                self.alert("Training failed", f"{type(error).__name__}: {error}", "ERROR")
        if status == "requeued":
            import wandb

            for close in (self._experiment.finish, wandb.teardown):
                with ignore_errors():
                    close()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.environ.setdefault("WANDB_DATA_DIR", f"{self.save_dir}/wandb")  # where artifacts wait for their upload
            run = self.start()
            run.define_metric(IMAGES_SEEN)
            run.define_metric("*", step_metric=IMAGES_SEEN, overwrite=True)
        return self._experiment

    def start(self) -> Any:
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


def log_model(loggers: Sequence[Any], folder: str | Path, alias: str) -> None:
    """Log a pipeline folder to each wandb logger that logs models. Call it on rank 0."""
    for logger in model_loggers(loggers):
        logger.log_folder(folder, alias, wait=alias == "last")


def model_loggers(loggers: Sequence[Any]) -> list[WandbLogger]:
    return [logger for logger in loggers if isinstance(logger, WandbLogger) and logger.log_model]
