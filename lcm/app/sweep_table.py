"""One table and one plot of all runs of a sweep (`python train.py -m model.ema_decay=0,0.95`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig

from lcm.app.overrides import shown
from lcm.runtime.atomic_io import whole_file
from lcm.runtime.redaction import redacted


class SweepTable(Callback):
    """A Hydra callback that collects each run's swept values and last `val/` metrics in table.md and plot.png.

    Each run writes a file into the sweep's folder (`hydra.sweep.dir`). Runs on other machines must share this folder.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        hide_secrets(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode.name != "MULTIRUN":
            return
        completed = job_return.cfg if job_return.status == JobStatus.COMPLETED else None
        run_dir = None if completed is None else completed.paths.run_dir
        if run_dir and not Path(run_dir).is_dir():  # the job was refused before its first step
            run_dir = None
        swept = dict(map(shown, config.hydra.overrides.task))
        note = {
            "swept": redacted(swept),
            "run": run_dir,
            "metrics": last_metrics(Path(run_dir, "metrics.csv")) if run_dir else {},
        }
        Path(config.hydra.sweep.dir, f"run-{config.hydra.job.num:04d}.json").write_text(json.dumps(note))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        hide_secrets(config)
        folder = Path(config.hydra.sweep.dir)
        for file in folder.glob("slurm/*/*.pkl"):  # submitit's files hold the overrides of jobs that have ended
            file.unlink()
        notes = [json.loads(file.read_text()) for file in sorted(folder.glob("run-*.json"))]
        keys = varied([note["swept"] for note in notes])
        names = sorted({name for note in notes for name in note["metrics"]})
        if not names:
            print(f"sweep:   no table: {why_no_table([note['run'] for note in notes if note['run']])}")
            return
        rows = [
            [*(note["swept"].get(key, "") for key in keys), *(number(note["metrics"].get(name)) for name in names), note["run"]]
            for note in notes
        ]
        lines = [[*keys, *names, "run"], ["---"] * (len(keys) + len(names) + 1), *rows]
        (folder / "table.md").write_text("".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))
        plot(notes, keys, [name for name in names if not name.endswith("_raw")], folder / "plot.png")
        print(f"sweep:   {folder}/table.md, {folder}/plot.png")


def hide_secrets(config: DictConfig) -> None:
    """Redact the secrets in multirun.yaml, which Hydra writes."""
    file = Path(config.hydra.sweep.dir, "multirun.yaml")
    if config.hydra.mode.name == "MULTIRUN" and file.is_file() and (text := file.read_text()) != (hidden := redacted(text)):
        with whole_file(file) as copy:
            copy.write(hidden.encode())


def why_no_table(runs: Sequence[str]) -> str:
    """Return the reason for an empty table."""
    if not runs:
        return "no job has trained, the errors are above"
    if not any(Path(run, "metrics.csv").is_file() for run in runs):
        return "it reads metrics.csv, add logger=csv"
    return (
        "no run has measured a metric named val/, add callbacks=evaluation for FID and CLIP score, or for val/loss give "
        "data.val_shards and a trainer.val_check_interval of at most trainer.max_steps"
    )


def number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4g}"


def last_metrics(file: Path) -> dict[str, float]:
    """Return the last value of each `val/` metric of a run's metrics.csv."""
    from lcm.app.html_report import read_metrics  # imports torch, for which `--cfg` should not wait

    return {name: values[max(values)] for name, values in read_metrics(file).items() if name.startswith("val/")}


def varied(swept: Sequence[dict[str, str]]) -> list[str]:
    """Return the overrides that differ between runs, the one with most values last."""
    values = {key: {str(run.get(key)) for run in swept} for first in swept for key in first}
    return sorted((key for key in values if len(values[key]) > 1), key=lambda key: len(values[key]))


def plot(notes: Sequence[dict[str, Any]], keys: Sequence[str], names: Sequence[str], file: Path) -> None:
    """Draw one panel for each metric: the last key along x, a line for each value of the other keys."""
    *others, last = keys or [""]
    ticks = list(dict.fromkeys(note["swept"].get(last, "") for note in notes))
    figure = Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for note in notes:
            if name in note["metrics"]:
                label = ", ".join(note["swept"].get(key, "") for key in others)
                lines.setdefault(label, []).append((ticks.index(note["swept"].get(last, "")), note["metrics"][name]))
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=name.removeprefix("val/"), xticks=range(len(ticks)), xticklabels=ticks, xlabel=last)
    if others:
        axes[0][0].legend(title=", ".join(others), fontsize="small")
    figure.savefig(file, dpi=120)
