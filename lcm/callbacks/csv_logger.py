"""Metrics in one CSV file. A restart appends to the file. Lightning's CSVLogger would delete it."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lcm.runtime.atomic_io import whole_file


class CSVLogger(Logger):
    """Write `folder/metrics.csv`, one row for each logged step. A metric adds its column when it is first logged."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml in the run folder has the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{name: value for name, value in metrics.items() if name != "epoch"}}
        columns = self._header()
        if new := [name for name in row if name not in columns]:
            columns = self._add_columns(columns + new)
        with self.file.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _header(self) -> list[str]:
        if not self.file.is_file():
            return []
        with self.file.open(newline="") as file:
            return next(csv.reader(file), [])

    def _add_columns(self, columns: list[str]) -> list[str]:
        """Rewrite the file with these columns."""
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, columns)
        writer.writeheader()
        if self.file.is_file():
            writer.writerows(csv.DictReader(io.StringIO(self.file.read_text(), newline="")))
        with whole_file(self.file) as file:
            file.write(content.getvalue().encode())
        return columns
