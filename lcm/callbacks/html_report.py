"""A report of a training run."""

from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from lcm.app.html_report import Section, curve_sections, evenly, picture_source, read_metrics, write_report
from lcm.runtime.environment import command_line


class HTMLReport(L.Callback):
    """Write `folder/report.html` at the end, also of an interrupted run: curves, image grids, configuration and environment.

    Curves come from `folder/metrics.csv` (`logger=csv`), image grids from `folder/samples`. A resumed run replaces the report.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        run = "/".join(self.folder.parts[-2:])
        summary = f"{type(module).__name__} after {trainer.global_step} steps"
        grids = {
            f"step {int(file.stem.partition('-')[2])}": file for file in evenly(sorted(self.folder.glob("samples/step-*.png")))
        }
        config = self.folder / "config.yaml"
        sections = [
            Section("Samples", pictures={label: picture_source(Image.open(file)) for label, file in grids.items()}),
            *curve_sections(read_metrics(self.folder / "metrics.csv")),
            Section("Configuration", text=config.read_text() if config.is_file() else ""),
        ]
        write_report(self.folder / "report.html", f"Run {run}", summary, sections, command_line("train.py"))
